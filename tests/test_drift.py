"""SCAFFOLD and FedDyn: against plain loops, and at the optimum that FedAvg's local steps miss by a known distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
import quadratics
from cases import classification_clients, redraw
from fedprior import inference, priors, tree
from fedprior.codecs import Dense
from fedprior.inference.viewed import Viewed
from fedprior.objective import Objective
from fedprior.posteriors import Tilted
from fedprior.rng import generator
from quadratics import SIZE, best, hessian, optimum, phi, weights

CLIENTS = quadratics.clients()
LR, STEPS = 0.2, 8
WEIGHTINGS = pytest.mark.parametrize("weighting", ["uniform", "examples"])
MAKERS = pytest.mark.parametrize("make", [fp.scaffold, lambda *a, **k: fp.feddyn(*a, alpha=0.5, **k)])


def fedavgs_fixed_point(weighting: str) -> Tensor:
    """K steps take w to theta_s + A_s^K (w - theta_s), A_s = 1 - lr H_s; w is the weighted mean of that."""
    missing = [torch.eye(SIZE).double() - torch.matrix_power(torch.eye(SIZE) - LR * hessian(c), STEPS) for c in CLIENTS]
    pull = [n * m for n, m in zip(weights(CLIENTS, weighting), missing, strict=True)]
    return quadratics.joint(pull, [optimum(c) for c in CLIENTS])


@WEIGHTINGS
@MAKERS
def test_the_optimum_that_fedavg_misses(make: Callable[..., fp.Algorithm], weighting: Any) -> None:
    """FedAvg ends at its own fixed point, away from the optimum; the corrected ones end at the optimum."""
    wanted, biased = best(CLIENTS, weighting), fedavgs_fixed_point(weighting)
    averaged = quadratics.run(fp.fedavg(LR, STEPS, None, weighting), CLIENTS, 25)
    assert torch.allclose(phi(averaged), biased, rtol=0, atol=1e-8)
    assert (biased - wanted).abs().max() > 0.1
    corrected = quadratics.run(make(LR, epochs=STEPS, batch_size=None, weighting=weighting), CLIENTS, 60)
    assert torch.allclose(phi(corrected), wanted, rtol=0, atol=1e-7)


@MAKERS
def test_two_clients_a_round_are_enough(make: Callable[..., fp.Algorithm]) -> None:
    """The means run over the clients seen so far, those that are not in the round included."""
    result = quadratics.run(make(0.1, epochs=3, batch_size=None, weighting="uniform"), CLIENTS, 250, cohort=2)
    assert torch.allclose(phi(result), best(CLIENTS, "uniform"), rtol=0, atol=1e-6)
    assert float(result.eta.seen["clients"]) == len(CLIENTS)


@WEIGHTINGS
def test_at_the_optimum_a_control_is_the_clients_slope(weighting: Any) -> None:
    """c_s = grad l_s(w), and their weighted mean c = 0; FedDyn's multipliers are the same slopes."""
    for make, field in ((fp.scaffold, "control"), (fp.feddyn, "dual")):
        algorithm = make(LR, epochs=STEPS, batch_size=None, weighting=weighting)
        if make is fp.feddyn:
            algorithm = replace(algorithm, prior=priors.FedDyn(0.5))
        result = quadratics.run(algorithm, CLIENTS, 60)
        assert getattr(result.eta, field)["weight"].abs().max() < 1e-7
        for client in CLIENTS:
            rng = generator(0, "again")
            objective = Objective(result.model(), "regression")
            _, own = algorithm.inference.e_step(
                objective, algorithm.prior, result.eta, client, slope(result, client), rng
            )
            assert torch.allclose(own["weight"], slope(result, client)["weight"], rtol=0, atol=1e-6)


def slope(result: fp.Result, client: fp.Client) -> fp.Params:
    return {"weight": (hessian(client) @ (phi(result) - optimum(client)))[None]}


def karimireddy(net: nn.Module, clients: list[fp.Client], rounds: int, lr: float, epochs: int, batch: int) -> fp.Params:
    """Karimireddy et al. 2020, Algorithm 1, option II, all clients, mini-batches; c_i = c = 0 at first."""
    objective = Objective(net)
    x, c = objective.params(), tree.map(torch.zeros_like, objective.params())
    own = [c for _ in clients]
    for number in range(1, rounds + 1):
        moves, changes = [], []
        for i, client in enumerate(clients):
            rng, y, steps = generator(0, number, i, "e_step"), x, 0
            torch.randint(2**62, (), generator=rng)
            for _ in range(epochs):
                for rows in torch.randperm(len(client.train), generator=rng).split(batch):
                    g = slope_of(objective, y, client.train.x[rows], client.train.y[rows])
                    y = {k: v - lr * (g[k] - own[i][k] + c[k]) for k, v in y.items()}
                    steps += 1
            new = {k: own[i][k] - c[k] + (x[k] - y[k]) / (steps * lr) for k in x}
            moves.append({k: y[k] - x[k] for k in x})
            changes.append({k: new[k] - own[i][k] for k in x})
            own[i] = new
        x = {k: v + torch.stack([m[k] for m in moves]).mean(0) for k, v in x.items()}
        c = {k: v + torch.stack([m[k] for m in changes]).sum(0) / len(clients) for k, v in c.items()}
    return x


def acar(
    net: nn.Module, clients: list[fp.Client], rounds: int, lr: float, epochs: int, batch: int, alpha: float
) -> fp.Params:
    """Acar et al. 2021, Algorithm 1, all clients, SGD from the server's weights."""
    objective = Objective(net)
    theta, h = objective.params(), tree.map(torch.zeros_like, objective.params())
    own = [h for _ in clients]
    for number in range(1, rounds + 1):
        ends = []
        for i, client in enumerate(clients):
            rng, y = generator(0, number, i, "e_step"), theta
            torch.randint(2**62, (), generator=rng)
            for _ in range(epochs):
                for rows in torch.randperm(len(client.train), generator=rng).split(batch):
                    g = slope_of(objective, y, client.train.x[rows], client.train.y[rows])
                    y = {k: v - lr * (g[k] - own[i][k] + alpha * (v - theta[k])) for k, v in y.items()}
            own[i] = {k: own[i][k] - alpha * (y[k] - theta[k]) for k in y}
            ends.append(y)
        h = {k: h[k] - alpha / len(clients) * sum(y[k] - theta[k] for y in ends) for k in h}
        theta = {k: torch.stack([y[k] for y in ends]).mean(0) - h[k] / alpha for k in h}
    return theta


def slope_of(objective: Objective, values: fp.Params, x: Tensor, y: Tensor) -> fp.Params:
    leaves = {k: v.detach().requires_grad_() for k, v in values.items()}
    loss = -objective.log_lik(leaves, x, y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("algorithm", [fp.scaffold, fp.feddyn], ids=lambda f: f.__name__)
def test_the_run_is_the_papers_loop(algorithm: Callable[..., fp.Algorithm]) -> None:
    """Mini-batches, ragged clients, a network: the same weights after five rounds, to rounding."""
    clients = classification_clients((7, 12, 5), dtype=torch.float64)
    net = redraw(fp.models.mlp(4, (6,), 3).double())
    made = replace(algorithm(0.1, epochs=2, batch_size=4, weighting="uniform"), codec=Dense("float64"))
    result = fp.run(made, net, clients, rounds=5)
    fields = (net, clients, 5, 0.1, 2, 4)
    wanted = karimireddy(*fields) if algorithm is fp.scaffold else acar(*fields, alpha=0.1)
    for name, value in wanted.items():
        assert torch.allclose(result.params[name], value, rtol=1e-9, atol=1e-9), name


def test_running_means_have_no_slope() -> None:
    """Batch norm's buffers are averaged, and get neither a tilt nor a control."""
    clients = [fp.Client(c.index, c.name, c.train) for c in classification_clients((8, 16))]
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    result = fp.run(fp.scaffold(0.1), redraw(net), clients, rounds=3)
    assert not result.eta.control["1.running_mean"].any() and result.eta.control["0.weight"].any()
    assert result.params["1.running_mean"].any()


def test_what_does_not_fit_is_refused() -> None:
    net = quadratics.model()
    with pytest.raises(TypeError, match="Gaussian has none"):
        fp.run(fp.Algorithm(priors.Gaussian(), inference.Tilted(0.1)), net, CLIENTS, rounds=1, loss="regression")
    with pytest.raises(ValueError, match="alpha must be"):
        fp.feddyn(alpha=0.0)


WRONG: dict[str, tuple[Callable[..., fp.Algorithm], type, str, Callable[..., Any]]] = {
    "sign of the tilt": (fp.scaffold, priors.Scaffold, "tilt", lambda f: lambda *a: tree.map(torch.neg, f(*a))),
    "control of the wrong size": (
        fp.scaffold,
        priors.Scaffold,
        "own",
        lambda f: lambda s, e, o, p, path: f(s, e, o, p, 2 * path),
    ),
    "control forgotten": (
        fp.scaffold,
        priors.Scaffold,
        "m_step",
        lambda f: lambda s, e, t: f(s, e, t)._replace(control=e.control),
    ),
    "sign of the dual": (
        fp.feddyn,
        priors.FedDyn,
        "own",
        lambda f: lambda s, e, o, p, path: tree.map(lambda g, w, x: g + s.alpha * (x - w), s.tilt(e, o), e.mean, p),
    ),
    "pull per data set": (
        fp.feddyn,
        Viewed,
        "stats",
        lambda f: lambda s, q: s.prior.stats(s.posterior(q.phi)),
    ),
    "dual forgotten": (
        fp.feddyn,
        priors.FedDyn,
        "m_step",
        lambda f: lambda s, e, t: f(s, e, t)._replace(mean=tree.map(lambda x: x / t.clients, t["phi"])),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_loop_catches_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, prior, method, wrong = WRONG[mistake]
    monkeypatch.setattr(prior, method, wrong(getattr(prior, method)))
    with pytest.raises(AssertionError):
        test_the_run_is_the_papers_loop(algorithm)


def test_the_state_is_that_of_a_new_client_once() -> None:
    """A first step is the vector itself; then it is the change."""
    algorithm, client = fp.scaffold(LR, batch_size=None), CLIENTS[0]
    objective, rng = Objective(quadratics.model(), "regression"), generator(0, "state")
    eta = algorithm.prior.init(objective.params())
    first, own = algorithm.inference.e_step(objective, algorithm.prior, eta, client, None, rng)
    assert isinstance(first, Tilted) and float(first.new["clients"]) == 1
    assert torch.equal(first.step["weight"], own["weight"])
    second, after = algorithm.inference.e_step(objective, algorithm.prior, eta, client, own, rng)
    assert float(second.new["clients"]) == 0
    assert torch.allclose(second.step["weight"], after["weight"] - own["weight"])
