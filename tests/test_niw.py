"""FedHB-NIW: the conjugate posterior, the pull in the E-step, and clients that are not in the round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, Normal

import fedprior as fp
import laws
import quadratics
from cases import PLAIN, Case, point, total
from fedprior import inference, posteriors, priors, tree
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, hessian, optimum

PRIOR = priors.NIW(0.5, 2.0, 4.0, 0.0)


def log_niw(mu: Tensor, v: Tensor, m: Any, scale: Any, level: float, dof: float) -> Tensor:
    """log NIW(mu, v; m, scale, level, dof) in one dimension, normalised: v = 1/g with g a Gamma."""
    rate = torch.as_tensor(scale, dtype=v.dtype) / 2
    return (
        Gamma(torch.tensor(dof / 2, dtype=v.dtype), rate).log_prob(1 / v)
        - 2 * v.log()
        + Normal(m, (v / level).sqrt()).log_prob(mu)
    )


def test_the_m_step_is_the_conjugate_posterior() -> None:
    """log prior + sum log N(phi_s; mu, v) - log posterior is the same number, log p(phi_1..N), at every (mu, v)."""
    rng, count = generator(0, "niw"), 6
    phi = torch.randn(count, SIZE, generator=rng, dtype=torch.float64) + 1
    stats = [PRIOR.stats(posteriors.Point({"w": row})) for row in phi]
    eta = PRIOR.m_step(PRIOR.init({"w": phi[0]}), total(stats))
    m, scale, n = eta.mean["w"], eta.scale["w"], float(eta.seen["clients"])
    assert n == count
    evidence = []
    for _ in range(5):
        mu = torch.randn(SIZE, generator=rng, dtype=torch.float64)
        v = 0.2 + 2 * torch.rand(SIZE, generator=rng, dtype=torch.float64)
        joint = log_niw(mu, v, torch.zeros(SIZE).double(), PRIOR.scale, PRIOR.kappa, PRIOR.dof)
        joint = joint + Normal(mu, v.sqrt()).log_prob(phi).sum(0)
        evidence.append(joint - log_niw(mu, v, m, scale, PRIOR.kappa + n, PRIOR.dof + n))
    assert torch.allclose(torch.stack(evidence), evidence[0].expand(5, SIZE), rtol=1e-10, atol=1e-10)


def test_log_prob_is_the_expectation() -> None:
    """E_q log N(phi; mu, v) by a million draws from q, within 5 standard errors."""
    rng = generator(0, "draws").initial_seed() % 2**32
    import numpy as np

    draws, n, level = 1_000_000, PRIOR.dof + 3.0, PRIOR.kappa + 3.0
    m, scale, phi = 0.7, 1.9, 1.5
    source = np.random.default_rng(rng)
    v = 1 / source.gamma(n / 2, 2 / scale, draws)
    mu = m + np.sqrt(v / level) * source.standard_normal(draws)
    values = torch.from_numpy(-0.5 * (np.log(v) + (phi - mu) ** 2 / v))
    eta = priors.NIW.Eta(*({k: torch.tensor([x]).double()} for k, x in (("w", m), ("w", scale))), count(3.0))
    got = PRIOR.log_prob(eta, PRIOR.stats(posteriors.Point({"w": torch.tensor([phi]).double()})))
    assert abs(float(got - values.mean())) < 5 * float(values.std()) / draws**0.5


def count(n: float) -> fp.Params:
    return {"clients": torch.tensor(n, dtype=torch.float64)}


def test_a_client_is_pulled_with_n_over_v() -> None:
    """SGD to the end: (N_s H_s + n/V) phi = N_s H_s theta_s + (n/V) m."""
    client, objective = quadratics.clients()[0], Objective(quadratics.model(), "regression")
    eta = priors.NIW.Eta(objective.params(), {"weight": torch.tensor([[2.0, 4.0, 1.0]]).double()}, count(6.0))
    e_step = inference.Point(0.2, 400, None)
    q, _ = e_step.e_step(objective, PRIOR, eta, client, None, generator(0, "e_step"))
    pull = (PRIOR.dof + 6) / torch.tensor([2.0, 4.0, 1.0]).double()
    curvature = len(client.train) * hessian(client)
    wanted = torch.linalg.solve(
        curvature + pull.diag(), curvature @ optimum(client) + pull * objective.params()["weight"][0]
    )
    assert torch.allclose(q.phi["weight"][0], wanted, rtol=0, atol=1e-8)


def test_those_not_in_the_round_count() -> None:
    """Two clients that stand for ten: sums times five."""
    stats = total([PRIOR.stats(posteriors.Point({"w": torch.tensor([x]).double()})) for x in (1.0, 2.0)])
    eta = priors.NIW(clients=10, spread=0).m_step(priors.NIW().init({"w": torch.zeros(1).double()}), stats)
    assert float(eta.mean["w"]) == pytest.approx(15 / 11)
    assert float(eta.scale["w"]) == pytest.approx(1 + 25 - 11 * (15 / 11) ** 2)
    assert float(eta.seen["clients"]) == 10
    with pytest.raises(ValueError, match="need scale"):
        priors.NIW(kappa=0.0)


Method = Callable[..., Any]
WRONG: dict[str, tuple[str, Callable[[Method], Method]]] = {
    "mean of the clients alone": (
        "m_step",
        lambda f: lambda s, e, t: f(s, e, t)._replace(mean=tree.map(lambda x: x / t.clients, t["phi"])),
    ),
    "no m^2 in V": (
        "m_step",
        lambda f: (
            lambda s, e, t: f(s, e, t)._replace(
                scale=tree.map(lambda v, m: v - s.kappa * m**2, f(s, e, t).scale, f(s, e, t).mean)
            )
        ),
    ),
    "n forgets the clients": ("m_step", lambda f: lambda s, e, t: f(s, e, t)._replace(seen=e.seen)),
    "hyper-prior in the likelihood": ("log_prob", lambda f: lambda s, e, t: f(s, e, t) + s.log_hyper(e, e)),
    "hyper-prior forgotten": ("log_hyper", lambda f: lambda s, e, b: 0 * f(s, e, b)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_law_catches_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, wrong = WRONG[mistake]
    monkeypatch.setattr(priors.NIW, method, wrong(getattr(priors.NIW, method)))
    with pytest.raises(AssertionError):
        laws.stationary(Case("niw", PRIOR, PLAIN, point))
