"""FedEM and IFCA: responsibilities by enumeration, one round as gradient EM on the pooled data, planted components."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
import quadratics
from cases import PLAIN, Case, classification_clients, close, equal, mixed, total
from fedprior import Client, Examples, inference, priors
from fedprior.inference import mixture
from fedprior.objective import Objective
from fedprior.priors import components
from fedprior.priors.parts import part_etas
from fedprior.rng import generator
from laws import caught
from quadratics import SIZE, best

PLANTED = torch.tensor([[2.0, 0.0, -1.0], [-1.0, 1.5, 1.0]], dtype=torch.float64)
PI = (0.9, 0.7, 0.3, 0.1)


def planted(shares: Sequence[float], size: int = 60, noise: float = 0.3) -> list[Client]:
    """Of client s, a fraction shares[s] of the examples comes from PLANTED[0], the others from PLANTED[1]."""
    rng, made = generator(0, "planted"), []
    for index, share in enumerate(shares):
        x = torch.randn(size, SIZE, generator=rng, dtype=torch.float64)
        w = PLANTED[(torch.arange(size) >= round(share * size)).long()]
        y = (x * w).sum(1, keepdim=True) + noise * torch.randn(size, 1, generator=rng, dtype=torch.float64)
        made.append(Client(index, f"client-{index}", Examples(x, y)))
    return made


CLIENTS = quadratics.clients()


def nats(w: Tensor, client: Client) -> Tensor:
    """log p(y_i | x_i, w_k), (N, K), unit variance and without the constant, for w (K, d)."""
    return -0.5 * (client.train.y - client.train.x @ w.T) ** 2


def start(algorithm: fp.Algorithm) -> tuple[Objective, Any, Any]:
    """The objective, the bound prior and the first eta."""
    model = quadratics.model()
    prior = algorithm.bind(model, CLIENTS[0].train.x).prior
    objective = Objective(model, "regression")
    return objective, prior, prior.init(objective.params())


def weights(eta: Any) -> Tensor:
    """(K, d)."""
    return torch.stack([part.mean["weight"][0] for part in part_etas(eta)])


def test_responsibilities_are_marginals_of_all_assignments() -> None:
    """p(z_1 .. z_N | y) over K^N assignments: its marginals are r, and their means pi."""
    few = Client(0, "few", CLIENTS[0].train.take(torch.arange(4)))
    made = fp.fedem(0.1, components=3)
    objective, prior, eta = start(made)
    state = {"pi": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)}
    q, own = made.inference.e_step(objective, prior, eta, few, state, generator(0, "e_step"))
    p = nats(weights(eta), few).exp() * state["pi"]
    r, evidence = torch.zeros(4, 3, dtype=torch.float64), 0.0
    for z in product(range(3), repeat=4):
        joint = math.prod(float(p[i, k]) for i, k in enumerate(z))
        evidence += joint
        for i, k in enumerate(z):
            r[i, k] += joint
    assert torch.allclose(q.pi["pi"], (r / evidence).mean(0), rtol=1e-9, atol=0)
    assert own is not None and torch.equal(own["pi"], q.pi["pi"])


def test_a_hard_client_has_the_cluster_that_fits_best() -> None:
    """One-hot, no state, and the others' models as they were sent."""
    made = fp.ifca(0.1, clusters=3)
    objective, prior, eta = start(made)
    for client in CLIENTS:
        q, own = made.inference.e_step(objective, prior, eta, client, None, generator(0, "e_step"))
        fits = [float(nats(weights(eta)[k : k + 1], client).sum()) for k in range(3)]
        one = [float(k == fits.index(max(fits))) for k in range(3)]
        assert own is None and q.pi["pi"].tolist() == one
        moved = [not equal(a.phi, b) for a, b in zip(q.parts, prior.points(eta), strict=True)]
        assert moved == [bool(v) for v in one]


def pooled_em(w: Tensor, clients: Sequence[Client], rounds: int, lr: float, hard: bool) -> tuple[Tensor, Tensor]:
    """Gradient EM by plain loops: all examples in one place, and pi for each client."""
    components = len(w)
    pi = torch.full((len(clients), components), 1 / components, dtype=torch.float64)
    for _ in range(rounds):
        slopes, mass = torch.zeros_like(w), torch.zeros(components, dtype=torch.float64)
        for s, client in enumerate(clients):
            scores = nats(w, client)
            ranked = scores.sum(0).expand_as(scores)
            r = (ranked == ranked.max()).double() if hard else scores.exp() * pi[s]
            r = r / r.sum(1, keepdim=True)
            pi[s] = r.mean(0)
            for x, y, r_i in zip(client.train.x, client.train.y, r, strict=True):
                slopes += (r_i * (y - w @ x))[:, None] * x
            mass += r.sum(0)
        w = torch.where(mass[:, None] > 0, w + lr * slopes / mass.clamp(min=1)[:, None], w)
    return w, pi


@pytest.mark.parametrize("make", [fp.fedem, fp.ifca], ids=lambda f: f.__name__)
def test_one_full_batch_step_a_round_is_gradient_em_on_the_pooled_data(make: Callable[..., fp.Algorithm]) -> None:
    """Client sizes differ: the weights are the examples' own."""
    made = make(0.2, 2, epochs=1, batch_size=None)
    result = quadratics.run(made, CLIENTS, 4)
    w, pi = pooled_em(weights(start(made)[2]), CLIENTS, 4, 0.2, make is fp.ifca)
    assert torch.allclose(weights(result.eta), w, rtol=1e-9, atol=1e-9)
    sizes = torch.tensor([float(len(c.train)) for c in CLIENTS], dtype=torch.float64)
    share = (sizes @ pi + 0.5) / (sizes.sum() + 1)
    assert torch.allclose(result.eta.share["pi"], share, rtol=1e-9, atol=0)


def test_one_component_is_fedavg_and_with_a_precision_fedprox() -> None:
    for precision, plain in ((0.0, fp.fedavg(0.1, 2, 4)), (5.0, fp.fedprox(0.1, 5.0, 2, 4))):
        made = fp.Algorithm(
            priors.Mixture(1, priors.Gaussian(precision), spread=0.0),
            inference.Mixture(inference.Point(0.1, 2, 4)),
            weighting=plain.weighting,
            name="one",
        )
        assert close(quadratics.run(made, CLIENTS, 3).params, quadratics.run(plain, CLIENTS, 3).params, 1e-9)


def test_the_likelihood_never_falls() -> None:
    """Steps below 1 / the largest curvature: sum_s sum_i log sum_k pi_sk p(y_i | w_k) rises from round to round."""
    made, before = fp.fedem(0.1, 2, batch_size=None), -math.inf
    for rounds in range(1, 8):
        result = quadratics.run(made, CLIENTS, rounds)
        value = sum(
            float((nats(weights(result.eta), c).exp() @ (result.store.load(c.index) or {})["e_step/pi"]).log().sum())
            for c in CLIENTS
        )
        assert value > before
        before = value


def test_ifca_finds_the_clusters_and_ends_at_each_ones_optimum() -> None:
    clients = planted((1, 1, 1, 0, 0))
    result = quadratics.run(fp.ifca(0.3, batch_size=None), clients, 80)
    groups = clients[:3], clients[3:]
    first = int((weights(result.eta) - PLANTED[0]).norm(dim=1).argmin())
    for k, group in zip((first, 1 - first), groups, strict=True):
        assert torch.allclose(weights(result.eta)[k], best(group, "examples"), rtol=0, atol=1e-6)
        for client in group:
            own = result.personal(client)
            x, y, w = client.train.x, client.train.y, weights(result.eta)[k]
            adapted = w + 0.3 * x.T @ (y.squeeze(-1) - x @ w) / len(x)  # one step of the E-step on all examples
            assert own.weights == (1.0,)
            assert torch.allclose(own.models[0]["weight"][0], adapted, rtol=0, atol=1e-9)
            assert not torch.allclose(adapted, w, rtol=0, atol=1e-3)
    assert torch.equal(result.params["weight"][0], weights(result.eta)[first])  # 3 of 5 clients
    assert not any(result.store.load(c.index) for c in clients)


def test_fedem_finds_components_and_each_clients_shares() -> None:
    """Noise of the model's own size, 1: pi within 4 deviations of an estimate that knows where each example is from."""
    size = 400
    clients = planted(PI, size, noise=1.0)
    result = quadratics.run(fp.fedem(0.3, 2, spread=2.0, batch_size=None), clients, 150)
    first = int((weights(result.eta) - PLANTED[0]).norm(dim=1).argmin())
    assert torch.allclose(weights(result.eta)[[first, 1 - first]], PLANTED, rtol=0, atol=0.25)
    for share, client in zip(PI, clients, strict=True):
        new = result.personal(Client(client.index + 100, "new", client.train))  # EM finds pi without a state
        for own in (result.personal(client), new):
            assert own.weights[first] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / size))
        assert new.weights == pytest.approx(result.personal(client).weights, abs=1e-3)


@pytest.mark.parametrize("state", [None, {"pi": torch.tensor([0.9, 0.1], dtype=torch.float64)}], ids=["new", "known"])
def test_a_soft_client_predicts_with_components_that_have_made_a_step(state: Any) -> None:
    """phi_k = w_k + lr sum_i r_ik (y_i - w_k x_i) x_i / sum_i r_ik, where pi = mean_i r_i no longer moves."""
    made: Any = fp.fedem(0.3, 2, spread=2.0, batch_size=None)
    (client,) = planted((0.7,))
    objective, prior, eta = start(made)
    own = made.inference.personal(objective, prior, eta, client, state, generator(0, "personal"))
    w, pi = weights(eta), torch.tensor(own.weights, dtype=torch.float64)
    r = nats(w, client).exp() * pi
    r = r / r.sum(1, keepdim=True)
    assert torch.allclose(r.mean(0), pi, rtol=0, atol=1e-6) and 0.01 < float(pi[0]) < 0.99
    for k, model in enumerate(own.models):
        slope = sum(r_i[k] * (y - w[k] @ x) * x for x, y, r_i in zip(client.train.x, client.train.y, r, strict=True))
        assert torch.allclose(model["weight"][0], w[k] + 0.3 * slope / r[:, k].sum(), rtol=0, atol=1e-9)
        assert not torch.allclose(model["weight"][0], w[k], rtol=0, atol=1e-3)


def test_personal_models_beat_one_for_all_where_labels_are_swapped() -> None:
    """Two groups whose classes 0 and 1 are exchanged: no single model can be right for both."""
    data, clients = classification_clients((120,) * 6), []
    for client in data:
        y = client.train.y
        y = y if client.index % 2 else torch.tensor([1, 0, 2])[y]
        train, held = (Examples(client.train.x[rows], y[rows]) for rows in (slice(80), slice(80, None)))
        clients.append(Client(client.index, client.name, train, held))
    found = {}
    for made in (fp.fedavg(0.1), fp.fedem(0.1, 2), fp.ifca(0.1)):
        result = fp.run(made, fp.models.mlp(4, (8,), 3, seed=0), clients, rounds=15)
        rows = fp.metrics.over_clients(result.personalised(clients))
        found[made.name] = [rows[f"{when}_accuracy"]["mean"] for when in ("before", "after")]
    assert min(found["fedem"][1], found["ifca"][1]) > found["fedavg"][0] + 0.2, found


def test_components_start_apart_and_buffers_together() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    params = Objective(model).params()
    eta = priors.Mixture(3).bind(model, torch.zeros(1, 4)).init(params)
    for name, value in part_etas(eta)[1].mean.items():
        same = torch.equal(value, params[name])
        assert same == (name.startswith("1.running") or not params[name].any()), name


def test_a_component_that_nobody_has_keeps_its_place() -> None:
    case = Case("mixture", priors.Mixture(), PLAIN, mixed)
    stats, eta = total(case.clients()), case.eta()
    on = {"part1_phi": 0.0, "pi": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)}
    empty = {term: {n: v * on.get(term, 1.0) for n, v in params.items()} for term, params in stats.terms.items()}
    new = case.prior.m_step(eta, replace(stats, terms=empty))
    kept = [equal(a.mean, b.mean) for a, b in zip(part_etas(new), part_etas(eta), strict=True)]
    assert kept == [False, True, False]
    assert float(new.share["pi"][1]) == pytest.approx(1 / 3 / (stats.clients + 1)) and bool((new.share["pi"] > 0).all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="Mixture needs a prior with components"):
        quadratics.run(fp.Algorithm(priors.Gaussian(), inference.Mixture(inference.Point(0.1))), CLIENTS, 1)
    with pytest.raises(TypeError, match=r"needs responsibilities, and Point has none: use inference\.Mixture"):
        quadratics.run(fp.Algorithm(priors.Mixture(), inference.Point(0.1)), CLIENTS, 1)
    wrongs: list[dict[str, Any]] = [{"components": 0}, {"spread": -1.0}, {"spread": math.inf}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="need components >= 1"):
            priors.Mixture(**wrong)


MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "pi is forgotten": (
        inference.Mixture,
        "_responsibilities",
        lambda f: lambda s, x, pi: f(s, x, torch.ones_like(pi)),
    ),
    "one z for the client": (
        inference.Mixture,
        "_responsibilities",
        lambda f: lambda s, x, pi: f(s, x.sum(0).expand_as(x), pi),
    ),
    "nats for likelihoods": (inference.Mixture, "_responsibilities", lambda f: lambda s, x, pi: -x / x.sum(1)[:, None]),
    "all examples for all": (
        inference.Mixture,
        "_train",
        lambda f: lambda s, o, p, w, c, r, g: f(s, o, p, w, c, torch.ones_like(r), g),
    ),
    "an average over all clients": (
        components,
        "each",
        lambda f: lambda eta, t: ((part, replace(own, clients=t.clients)) for part, own in f(eta, t)),
    ),
    "one client too many in the shares": (
        components,
        "share_m_step",
        lambda f: lambda pi, clients: f(pi, clients + 1),
    ),
    "a mean over clients": (
        priors.Mixture,
        "stats",
        lambda f: lambda s, q: replace(f(s, q), terms={**f(s, q).terms, "part0_phi": q.parts[0].phi}),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_pooled_em_catches_the_mistake(mistake: str) -> None:
    caught(*MISTAKES[mistake], lambda: test_one_full_batch_step_a_round_is_gradient_em_on_the_pooled_data(fp.fedem))


def test_enumeration_catches_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mixture.log_likelihoods
    monkeypatch.setattr(mixture, "log_likelihoods", lambda *args: 2 * right(*args))
    with pytest.raises(AssertionError):
        test_responsibilities_are_marginals_of_all_assignments()
