"""FedHB's mixture: the E-step's stationary point, the M-step by plain loops, and one centre as FedProx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
import quadratics
from cases import close, total
from fedprior import Client, Params, inference, posteriors, priors
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, hessian, optimum

CLIENTS = quadratics.clients()
OBJECTIVE = Objective(quadratics.model(), "regression")
PRIOR = priors.Centres(3, priors.Gaussian(4.0), spread=1.0)


def softmax(phi: Tensor, r: Tensor, precision: float) -> Tensor:
    """c by the densities of N(r_k, I / precision) themselves."""
    density = torch.stack([torch.exp(-0.5 * precision * ((phi - r_k) ** 2).sum()) for r_k in r])
    return density / density.sum()


def climbed(client: Client) -> tuple[posteriors.Mixed, Tensor]:
    """An E-step to the end, and the centres."""
    eta = PRIOR.init(OBJECTIVE.params())
    e_step = inference.Centres(0.1, 1500, None)
    q, state = e_step.e_step(OBJECTIVE, PRIOR, eta, client, None, generator(0, "e_step"))
    assert state is None
    return q, torch.stack([r["weight"][0] for r in PRIOR.points(eta)])


@pytest.mark.parametrize("client", CLIENTS, ids=lambda c: c.name)
def test_the_e_step_ends_where_both_slopes_cancel(client: Client) -> None:
    """N H (optimum - phi) + precision sum_k c_k (r_k - phi) = 0, with c the softmax at phi."""
    q, r = climbed(client)
    phi, c = q.parts[0].phi["weight"][0], q.pi["pi"]
    assert torch.allclose(c, softmax(phi, r, PRIOR.prior.precision), rtol=1e-9, atol=1e-12)
    slope = len(client.train) * hessian(client) @ (optimum(client) - phi) + PRIOR.prior.precision * (c @ r - phi)
    assert float(slope.abs().max()) < 1e-7
    assert all(part is q.parts[0] for part in q.parts)


def test_the_m_step_is_the_shrunk_mean_of_each_centre() -> None:
    """r_k = sum_s c_sk phi_s / (ridge / precision + sum_s c_sk), and twice the sums for twice the clients."""
    rng = generator(0, "m_step")
    phi = torch.randn(5, SIZE, generator=rng, dtype=torch.float64)
    c = torch.randn(5, 3, generator=rng, dtype=torch.float64).softmax(1)
    sums = total(
        [
            PRIOR.stats(posteriors.Mixed((posteriors.Point({"w": a}),) * 3, {"pi": b}))
            for a, b in zip(phi, c, strict=True)
        ]
    )
    for clients, times in ((None, 1), (10, 2)):
        prior = priors.Centres(3, priors.Gaussian(4.0), ridge=2.0, clients=clients)
        new = prior.m_step(prior.init({"w": phi[0]}), sums)
        for k in range(3):
            top, bottom = torch.zeros(SIZE, dtype=torch.float64), 2.0 / 4.0
            for s in range(5):
                top += times * c[s, k] * phi[s]
                bottom += times * float(c[s, k])
            assert torch.allclose(prior.points(new)[k]["w"], top / bottom, rtol=1e-12, atol=0)
        assert torch.allclose(new.share["pi"], c.mean(0), rtol=1e-12, atol=0)


def test_one_centre_without_a_ridge_is_fedprox() -> None:
    prior = priors.Centres(1, priors.Gaussian(5.0), spread=0.0, ridge=0.0)
    made, plain = fp.Algorithm(prior, inference.Centres(0.1, 2, 4), name="one"), fp.fedprox(0.1, 5.0, 2, 4, "uniform")
    assert close(quadratics.run(made, CLIENTS, 3).params, quadratics.run(plain, CLIENTS, 3).params, 1e-9)


def test_a_centre_without_clients_keeps_its_place_and_moments_are_not_shrunk() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    params = Objective(model).params()
    prior = priors.Centres(2, priors.Gaussian(1.0)).bind(model, torch.zeros(1, 2))
    eta = prior.init(params)
    phi = (posteriors.Point(params),) * 2
    new = prior.m_step(eta, prior.stats(posteriors.Mixed(phi, {"pi": torch.tensor([1.0, 0.0]).double()})))
    first, second = prior.points(new)
    for name, value in params.items():
        assert torch.equal(second[name], prior.points(eta)[1][name])
        assert torch.equal(first[name], value if "running" in name else value / 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="Centres needs a prior with centres"):
        quadratics.run(fp.Algorithm(priors.Mixture(), inference.Centres(0.1)), CLIENTS, 1)
    wrongs: list[dict[str, Any]] = [{"prior": priors.Gaussian()}, {"ridge": -1.0}, {"clients": -1.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="need precision > 0"):
            priors.Centres(**wrong)


def apart(centres: list[Params], phi: Params) -> Tensor:
    """phi - r_k, (K, d)."""
    return torch.stack([(phi["weight"] - r["weight"])[0] for r in centres])


MISTAKES: dict[str, Callable[..., Tensor]] = {
    "distances, not squares": lambda o, p, r, phi: -0.5 * p * apart(r, phi).norm(dim=1),
    "no half": lambda o, p, r, phi: -p * apart(r, phi).square().sum(1),
    "the other sign": lambda o, p, r, phi: 0.5 * p * apart(r, phi).square().sum(1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_slopes_catch_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprior.inference.centres.scores", MISTAKES[mistake])
    with pytest.raises(AssertionError):
        test_the_e_step_ends_where_both_slopes_cancel(CLIENTS[0])
