"""pFedBayes: the mean-field posterior of a linear-Gaussian client, one step by hand, and what the server matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedprior as fp
import quadratics
from cases import close
from fedprior import inference, posteriors, priors, tree
from fedprior.inference import draws
from fedprior.objective import Objective
from fedprior.rng import generator
from quadratics import SIZE, hessian, optimum

CLIENTS = quadratics.clients()
CLIENT = CLIENTS[0]
PRIOR = priors.LearnedScale()


def trained(e_step: inference.MeanField, seed: int = 0) -> tuple[posteriors.Gaussian, Any, Any]:
    """The posterior of CLIENT, its state, and eta: mean 0.5 and variance 0.25, so that the pull is felt."""
    objective = Objective(quadratics.model(), "regression")
    eta = PRIOR.init(objective.params())
    eta = eta._replace(var=tree.map(lambda v: v / 4, eta.var))
    q, state = e_step.e_step(objective, PRIOR, eta, CLIENT, None, generator(seed, "e_step"))
    return q, state, eta


def exact(zeta: float, pull: float = 4.0) -> tuple[Tensor, Tensor]:
    """m = (N H + zeta P)^-1 (N H o + zeta P w) and 1 / s_j^2 = N H_jj / zeta + P_j."""
    h, n = hessian(CLIENT), len(CLIENT.train)
    p = pull * torch.eye(SIZE, dtype=torch.float64)
    w = torch.full((SIZE,), 0.5, dtype=torch.float64)
    m = torch.linalg.solve(n * h + zeta * p, n * h @ optimum(CLIENT) + zeta * p @ w)
    return m, n * h.diagonal() / zeta + pull


@pytest.mark.parametrize("zeta", [1.0, 4.0])
def test_it_ends_at_the_mean_field_posterior(zeta: float) -> None:
    """Small steps, whose noise is far below the widths; what is compared is in units of the widths."""
    fast = inference.MeanField(0.1, 200, None, zeta, 0.3)
    objective = Objective(quadratics.model(), "regression")
    q, state, eta = trained(fast)
    slow = replace(fast, lr=0.004, epochs=1200)
    q, _ = slow.e_step(objective, PRIOR, eta, CLIENT, state, generator(1, "e_step"))
    m, precision = exact(zeta)
    assert ((q.phi["weight"][0] - m) * precision.sqrt()).abs().max() < 0.3
    assert (q.precision["weight"][0] / precision).log().abs().max() < 0.2
    assert (exact(1.0)[1] / exact(4.0)[1]).log().abs().min() > 0.4  # zeta matters by more than that


def test_two_steps_by_hand() -> None:
    """Gradients of the bound in closed form, with the same draws."""
    lr, zeta, n = 0.1, 2.0, len(CLIENT.train)
    q, _, _ = trained(inference.MeanField(lr, 2, None, zeta, 0.3))
    rng = generator(0, "e_step")
    torch.randint(2**62, (), generator=rng)
    m, wide = torch.full((SIZE,), 0.5, dtype=torch.float64), torch.full((SIZE,), 0.3, dtype=torch.float64).log()
    w = m.clone()
    for _ in range(2):
        torch.randperm(n, generator=rng)
        e = torch.randn(1, SIZE, generator=rng, dtype=torch.float64)[0]
        s = wide.exp()
        slope = -hessian(CLIENT) @ (m + s * e - optimum(CLIENT))
        m, wide = (
            m + lr * (slope - zeta / n * 4 * (m - w)),
            wide + lr * (slope * s * e + zeta / n * (1 - 4 * s**2)),
        )
    assert torch.allclose(q.phi["weight"][0], m, rtol=1e-9, atol=1e-9)
    assert torch.allclose(q.precision["weight"][0], (-2 * wide).exp(), rtol=1e-9, atol=1e-9)


def test_the_server_matches_the_clients_moments() -> None:
    """After a round: the weighted mean of m_s, and of s_s^2 + m_s^2 less its square."""
    result = quadratics.run(fp.pfedbayes(0.1, spread=0.3), CLIENTS, 1)
    states = [result.store.load(c.index) or {} for c in CLIENTS]
    shares = torch.tensor([float(len(c.train)) for c in CLIENTS], dtype=torch.float64)
    shares = shares / shares.sum()
    m, wide = (torch.stack([s[f"e_step/{part}/weight"][0] for s in states]) for part in ("m", "wide"))
    mean = shares @ m
    assert torch.allclose(result.eta.mean["weight"][0], mean, rtol=1e-9, atol=1e-9)
    var = shares @ ((2 * wide).exp() + m**2) - mean**2
    assert torch.allclose(result.eta.var["weight"][0], var.clamp(min=1e-2), rtol=1e-9, atol=1e-9)


def test_personal_predictions_are_draws_of_the_clients_own_posterior() -> None:
    """Their mean and variance are those of q, within 5 deviations of 4000 draws."""
    e_step = inference.MeanField(0.1, spread=0.3, draws=4000)
    made = replace(fp.pfedbayes(), inference=e_step)
    result = quadratics.run(made, CLIENTS, 3)
    own = result.personal(CLIENT)
    rng = generator(0, CLIENT.index, "personal")
    state = {k.removeprefix("e_step/"): v for k, v in (result.store.load(CLIENT.index) or {}).items()}
    q, _ = e_step.e_step(result.objective, made.prior, result.eta, CLIENT, state, rng)
    models = torch.stack([model["weight"][0] for model in own.models])
    sd = q.precision["weight"][0] ** -0.5
    assert len(models) == 4000 and sum(own.weights) == pytest.approx(1)
    assert ((models.mean(0) - q.phi["weight"][0]) / sd).abs().max() < 5 / 4000**0.5
    assert (models.std(0) / sd - 1).abs().max() < 5 / (2 * 4000) ** 0.5


def test_its_state_goes_on() -> None:
    """Two runs of one epoch are not two new clients: the second begins where the first ended."""
    e_step = inference.MeanField(0.1, 1, None)
    objective = Objective(quadratics.model(), "regression")
    q, state, eta = trained(e_step)
    again, _ = e_step.e_step(objective, PRIOR, eta, CLIENT, state, generator(0, "e_step"))
    assert not close(again.phi, q.phi, 1e-6)
    wrongs: list[dict[str, Any]] = [{"zeta": 0.0}, {"spread": -1.0}, {"draws": 0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="need finite zeta"):
            replace(e_step, **wrong)


MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "draws at twice the width": (draws, "_noise", lambda f: lambda *a: tree.map(lambda e: 2 * e, f(*a))),
    "no noise": (draws, "_noise", lambda f: lambda *a: tree.map(torch.zeros_like, f(*a))),
    "no pull on the mean": (
        draws,
        "_pull",
        lambda f: lambda *a: (f(*a)[0], tree.map(torch.zeros_like, a[1]), *f(*a)[2:]),
    ),
    "no entropy": (draws, "_pull", lambda f: lambda *a: (*f(*a)[:3], tree.map(torch.zeros_like, a[2]))),
    "variance for the prior's precision": (
        priors.LearnedScale,
        "log_prob",
        lambda f: lambda s, e, t: f(s, e._replace(var=tree.map(lambda v: 1 / v, e.var)), t),
    ),
    "a point's moments": (
        posteriors.Gaussian,
        "second_moment",
        lambda f: lambda q: tree.map(torch.square, q.phi),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_closed_forms_catch_the_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong = MISTAKES[mistake]
    monkeypatch.setattr(owner, method, wrong(getattr(owner, method)))
    with pytest.raises(AssertionError):
        test_two_steps_by_hand()
