"""PVI, FedEP and FedSEP: the exact product posterior of linear-Gaussian clients, and what is exact beyond them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
import laws
import quadratics
from cases import PLAIN, Case, site
from fedprior import inference, priors, tree
from fedprior.inference import sites
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, hessian, optimum

DIAGONAL, FULL = quadratics.clients(diagonal=True), quadratics.clients()
START = torch.full((SIZE,), 0.5).double()
ONE_STEP: dict[str, Any] = {"lr": 1.0, "epochs": 1, "batch_size": None, "levenberg": 0.0}
NAMED = pytest.mark.parametrize("make", [fp.pvi, fp.fedep], ids=lambda f: f.__name__)


def product(clients: list[fp.Client], precision: float) -> tuple[Tensor, Tensor]:
    """Mean and precision matrix of N(theta_0, 1/precision) times all likelihoods."""
    curvatures = [len(c.train) * hessian(c) for c in clients]
    matrix = torch.stack(curvatures).sum(0) + precision * torch.eye(SIZE).double()
    right = precision * START + torch.stack([h @ optimum(c) for h, c in zip(curvatures, clients, strict=True)]).sum(0)
    return torch.linalg.solve(matrix, right), matrix


def point(result: fp.Result) -> Tensor:
    return result.params["weight"][0]


@NAMED
def test_one_undamped_round_is_the_product_posterior(make: Callable[..., fp.Algorithm]) -> None:
    """Diagonal curvature, full batches, everybody: exact. Further rounds change nothing."""
    mean, matrix = product(DIAGONAL, 3.0)
    assert (matrix - matrix.diag().diag()).abs().max() < 1e-12
    for rounds in (1, 4):
        result = quadratics.run(make(precision=3.0, damping=1.0, **ONE_STEP), DIAGONAL, rounds)
        assert torch.allclose(point(result), mean, rtol=0, atol=1e-9)
        assert torch.allclose(result.eta.precision["weight"][0], matrix.diag(), rtol=1e-9, atol=0)


@NAMED
def test_a_client_predicts_with_the_product_that_has_its_factor_once(make: Callable[..., fp.Algorithm]) -> None:
    """Those that took part are in q already; the last one, which did not, is added to it."""
    *seen, unseen = DIAGONAL
    result = quadratics.run(make(precision=3.0, damping=1.0, trust=1.0, **ONE_STEP), seen, 1)
    for client, mean in [*((c, product(seen, 3.0)[0]) for c in seen), (unseen, product(DIAGONAL, 3.0)[0])]:
        [phi] = result.personal(client).models
        assert torch.allclose(phi["weight"][0], mean, rtol=0, atol=1e-9)
    assert not torch.allclose(product(seen, 3.0)[0], product(DIAGONAL, 3.0)[0], atol=1e-3)


@NAMED
def test_a_client_that_trusts_the_others_less_predicts_with_a_power_of_their_product(
    make: Callable[..., fp.Algorithm],
) -> None:
    """cavity^trust times the client's own likelihood, whose factor is not in the cavity."""
    result = quadratics.run(make(precision=3.0, damping=1.0, trust=0.2, **ONE_STEP), DIAGONAL, 1)
    for index, client in enumerate(DIAGONAL):
        others, theirs = product([*DIAGONAL[:index], *DIAGONAL[index + 1 :]], 3.0)
        own = len(client.train) * hessian(client)
        mean = torch.linalg.solve(0.2 * theirs + own, 0.2 * theirs @ others + own @ optimum(client))
        [phi] = result.personal(client).models
        assert torch.allclose(phi["weight"][0], mean, rtol=0, atol=1e-9)


def alike(examples: int) -> fp.Client:
    """Every example is the same, so that the mean loss of every batch is, and has a diagonal Hessian."""
    x = torch.tensor([[1.5, 0.0, 0.0]]).double().expand(examples, SIZE)
    return fp.Client(0, "alike", fp.Examples(x, torch.full((examples, 1), 2.0).double()))


@pytest.mark.parametrize(
    ("client", "batch_size", "epochs", "steps"),
    [(DIAGONAL[1], None, 1, 1), (DIAGONAL[1], None, 400, 400), (alike(12), 12, 2, 2), (alike(12), 4, 2, 6)],
)
def test_levenberg_shortens_steps_and_moves_no_fixed_point(
    client: fp.Client, batch_size: int | None, epochs: int, steps: int
) -> None:
    """One step goes L / (L + levenberg N_s) of the way, coordinate by coordinate, whatever the batch; many arrive."""
    objective, prior = Objective(quadratics.model(), "regression"), priors.Sites(3.0)
    eta, examples = prior.init({"weight": START[None]}), len(client.train)
    matrix = 3.0 * torch.eye(SIZE).double() + client.train.x.T @ client.train.x
    mean = torch.linalg.solve(matrix, 3.0 * START + client.train.x.T @ client.train.y[:, 0])
    e_step = inference.Sites(1.0, epochs, batch_size, 1.0, levenberg=2.0)
    q, _ = e_step.e_step(objective, prior, eta, client, None, generator(0, "sign"))
    precision = (eta.precision["weight"] + q.precision["weight"])[0]
    shift = (eta.shift["weight"] + q.shift["weight"])[0]
    left = (2.0 * examples / (matrix.diag() + 2.0 * examples)) ** steps
    assert torch.allclose(shift / precision, mean + left * (START - mean), rtol=0, atol=1e-9)
    assert torch.allclose(precision, matrix.diag(), rtol=1e-9, atol=0)


@NAMED
def test_damping_and_a_cohort_reach_it_as_well(make: Callable[..., fp.Algorithm]) -> None:
    """A factor is replaced, not added again: rounds with some of the clients count nobody twice."""
    mean, matrix = product(DIAGONAL, 3.0)
    result = quadratics.run(make(precision=3.0, damping=0.5, **ONE_STEP), DIAGONAL, 60, cohort=2)
    assert torch.allclose(point(result), mean, rtol=0, atol=1e-7)
    assert torch.allclose(result.eta.precision["weight"][0], matrix.diag(), rtol=1e-7, atol=0)


def test_without_states_the_prior_is_spread_over_the_factors() -> None:
    """FedSEP: with equal shares 1/S, the fixed point is the product of the likelihoods alone."""
    result = quadratics.run(fp.fedsep(clients=len(DIAGONAL), damping=0.8, **ONE_STEP), DIAGONAL, 40)
    mean, matrix = product(DIAGONAL, 0.0)
    assert torch.allclose(point(result), mean, rtol=0, atol=1e-8)
    assert torch.allclose(result.eta.precision["weight"][0], matrix.diag(), rtol=1e-8, atol=0)


def test_without_states_a_client_trusts_the_share_of_the_others() -> None:
    """FedSEP: its likelihood times q^(trust (1 - 1/S)), for want of a factor to take out of q."""
    count = len(DIAGONAL)
    result = quadratics.run(fp.fedsep(clients=count, damping=0.8, trust=0.2, **ONE_STEP), DIAGONAL, 2)
    precision, shift = (0.2 * (1 - 1 / count) * part["weight"][0] for part in result.eta)
    for client in DIAGONAL:
        own = len(client.train) * hessian(client)
        mean = torch.linalg.solve(precision.diag() + own, shift + own @ optimum(client))
        [phi] = result.personal(client).models
        assert torch.allclose(phi["weight"][0], mean, rtol=0, atol=1e-9)


def test_a_mean_is_exact_where_the_curvature_is_not_diagonal() -> None:
    """Mean-field: the mean of the product posterior, whatever the noise in the curvature's estimates."""
    mean, matrix = product(FULL, 30.0)
    assert (matrix - matrix.diag().diag()).abs().max() > 3
    algorithm = fp.pvi(lr=0.3, precision=30.0, damping=0.3, epochs=10, batch_size=None)
    result = quadratics.run(algorithm, FULL, 80)
    assert torch.allclose(point(result), mean, rtol=0, atol=1e-4)


def test_curvatures_are_unbiased() -> None:
    """One step of lr 1: the change of the precision has the diagonal of N_s H_s as its mean over seeds."""
    client, objective, prior = FULL[1], Objective(quadratics.model(), "regression"), priors.Sites(1000.0)
    eta = prior.init(objective.params())
    draws = []
    for seed in range(300):
        e_step = inference.Sites(1.0, 1, None, 1.0, levenberg=0.0)
        q, _ = e_step.e_step(objective, prior, eta, client, None, generator(seed, "sign"))
        draws.append(q.precision["weight"][0])
    values, wanted = torch.stack(draws), len(client.train) * hessian(client).diag()
    assert (values > 0).all()  # nothing was clamped, which would be a bias
    assert ((values.mean(0) - wanted).abs() < 5 * values.std(0) / 300**0.5).all()
    assert (values.std(0) > 0).all()


def test_a_network_learns() -> None:
    """Precisions of factors stay >= 0, so that q is at least as sure as the prior; and the loss falls."""
    from cases import classification_clients, redraw

    clients = classification_clients((20, 30, 25), dtype=torch.float64)
    net = redraw(fp.models.mlp(4, (6,), 3).double())
    test = fp.Examples(torch.cat([c.train.x for c in clients]), torch.cat([c.train.y for c in clients]))
    for make in (fp.pvi, fp.fedep):
        result = fp.run(make(lr=0.2, precision=5.0, epochs=3), net, clients, rounds=10, test=test)
        assert all((v >= 5.0 - 1e-3).all() for v in result.eta.precision.values())
        nats = [r.metrics["nats"] for r in result.history]
        assert nats[-1] < 0.7 * nats[0] or nats[-1] < 0.4


def test_what_does_not_fit_is_refused() -> None:
    made = fp.Algorithm(priors.Gaussian(), inference.Sites())
    with pytest.raises(TypeError, match="Gaussian is none"):
        fp.run(made, quadratics.model(), FULL, rounds=1, loss="regression")
    net = nn.Sequential(nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 1)).double()
    with pytest.raises(ValueError, match="running means"):
        fp.run(fp.pvi(), net, FULL, rounds=1, loss="regression")
    values = {
        "lr": [1.5],
        "damping": [0.0, 1.5],
        "trust": [0.0, 1.5],
        "spread": [0.0],
        "clients": [1],
        "levenberg": [-1.0],
    }
    for wrong in ({name: value} for name, several in values.items() for value in several):
        with pytest.raises(ValueError, match="need lr, damping and trust"):
            inference.Sites(**wrong)


Method = Callable[..., Any]


def doubled(f: Method) -> Method:
    def curvature(objective: Any, m: fp.Params, steps: fp.Params, side: int, batch: Any) -> fp.Params:
        return tree.map(lambda v: 2 * v, f(objective, m, steps, side, batch))

    return curvature


def forgets(f: Method) -> Method:
    def e_step(self: Any, objective: Any, prior: Any, eta: Any, client: Any, state: Any, rng: Any) -> Any:
        return f(self, objective, prior, eta, client, None, rng)

    return e_step


def wrong_way(f: Method) -> Method:
    def slopes(objective: Any, m: fp.Params, steps: fp.Params, side: int, batch: Any) -> fp.Params:
        return f(objective, m, steps, -side, batch)

    return slopes


WRONG = {
    "twice the data": (sites, "_slopes", doubled),
    "no factor is remembered": (inference.Sites, "e_step", forgets),
    "curvature of the wrong sign": (sites, "_slopes", wrong_way),
    "shifts are averaged": (
        priors.Sites,
        "m_step",
        lambda f: lambda s, e, t: f(s, e, t.weighted(1 / t.clients)),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_closed_form_catches_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong = WRONG[mistake]
    monkeypatch.setattr(place, name, wrong(getattr(place, name)))
    with pytest.raises(AssertionError):
        test_one_undamped_round_is_the_product_posterior(fp.pvi)


@pytest.mark.parametrize("method", ["m_step", "log_prob", "log_hyper"])
def test_the_law_catches_a_factor(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(priors.Sites, method)
    wrong: dict[str, Method] = {
        "m_step": lambda s, e, t: right(s, e, t.weighted(2)),
        "log_prob": lambda s, e, t: 2 * right(s, e, t),
        "log_hyper": lambda s, e, before: 2 * right(s, e, before),
    }
    monkeypatch.setattr(priors.Sites, method, wrong[method])
    with pytest.raises(AssertionError):
        laws.stationary(Case("sites", priors.Sites(0.5), PLAIN, site))
