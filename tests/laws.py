"""The laws that a prior obeys whatever it is. Each takes a Case and raises an AssertionError where it is broken."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import Case, close, total
from fedprior import core, tree
from fedprior.rng import generator

FIVE = ("init", "stats", "log_prob", "m_step", "point")


def objective(case: Case, eta, stats) -> torch.Tensor:
    """What m_step maximises: log_prob, and the hyper-prior where there is one."""
    hyper = getattr(case.prior, "log_hyper", None)
    return case.prior.log_prob(eta, stats) + (hyper(eta, case.eta()) if hyper else 0.0)


def gradient(case: Case, eta, stats) -> core.Params:
    """d objective / d eta, flat."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tree.flatten(eta).items()}
    value = objective(case, tree.unflatten(eta, leaves), stats)
    if not value.requires_grad:
        return tree.map(torch.zeros_like, leaves)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def stationary(case: Case) -> None:
    """The gradient of log_prob + log_hyper is zero at the M-step's answer, which is found from the uplink alone."""
    stats = total(case.clients())
    eta = case.prior.m_step(case.eta(), stats.only(case.prior.uplink))
    largest = max(float(g.abs().max()) for g in gradient(case, eta, stats).values())
    assert largest < 1e-9, f"gradient {largest}"


def a_maximum(case: Case) -> None:
    """No eta near the M-step's answer is better."""
    stats, rng = total(case.clients()), generator(0, "perturb")
    eta = case.prior.m_step(case.eta(), stats.only(case.prior.uplink))
    best = float(objective(case, eta, stats))
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(10):
            flat = tree.map(
                lambda v, size=size: v * (1 + size * (2 * torch.rand(v.shape, generator=rng, dtype=v.dtype) - 1)),
                tree.flatten(eta),
            )
            other = float(objective(case, tree.unflatten(eta, flat), stats))
            assert other < best or (not case.curved and other <= best), f"{other} beats the M-step's {best}"


def linear(case: Case) -> None:
    """log_prob(eta, a t1 + b t2) = a log_prob(eta, t1) + b log_prob(eta, t2)."""
    eta, first, second = case.eta(1), *case.clients(2)
    a, b = 0.7, 2.5
    both = case.prior.log_prob(eta, first.weighted(a) + second.weighted(b))
    parts = a * case.prior.log_prob(eta, first) + b * case.prior.log_prob(eta, second)
    assert torch.allclose(both.double(), parts.double(), rtol=1e-12, atol=1e-12), f"{both} is not {parts}"


def order_is_irrelevant(case: Case) -> None:
    """Clients can be added in any order, up to rounding."""
    clients, eta = case.clients(7), case.eta()
    forward, backward = total(clients), total(clients[::-1])
    assert forward.clients == backward.clients
    a, b = case.prior.m_step(eta, forward), case.prior.m_step(eta, backward)
    assert close(tree.flatten(a), tree.flatten(b))
    assert torch.allclose(case.prior.log_prob(eta, forward), case.prior.log_prob(eta, backward), rtol=1e-12)


def a_weight_is_copies(case: Case) -> None:
    """A client of weight 3 is three clients, for the sums and for the M-step."""
    one, other = case.client(0), case.client(1)
    heavy, copies = one.weighted(3) + other, one + one + one + other
    assert heavy.clients == copies.clients == 4
    for term in heavy.terms:
        assert close(dict(heavy[term]), dict(copies[term]))
    a, b = case.prior.m_step(case.eta(), heavy), case.prior.m_step(case.eta(), copies)
    assert close(tree.flatten(a), tree.flatten(b))


def interface(case: Case) -> None:
    """The methods of core.Prior, in its order, with its number of arguments; stats stand for one client."""
    assert isinstance(case.prior, core.Prior)
    own = [name for name in vars(type(case.prior)) if name in FIVE]
    assert own == [name for name in FIVE if name in own]
    for name in FIVE:
        wanted = len(inspect.signature(getattr(core.Prior, name)).parameters) - 1
        assert len(inspect.signature(getattr(case.prior, name)).parameters) == wanted, name
    eta, stats = case.eta(), case.client(0)
    assert stats.clients == 1
    assert set(case.prior.uplink) <= stats.terms.keys()
    assert all(isinstance(getattr(eta, field), dict) for field in eta._fields)
    value = case.prior.log_prob(eta, stats)
    assert value.ndim == 0 and bool(torch.isfinite(value))
    new = case.prior.m_step(eta, stats.only(case.prior.uplink))
    for a, b in ((eta, new), (case.params, case.prior.point(eta))):
        a, b = (x if isinstance(x, dict) else tree.flatten(x) for x in (a, b))
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}


LAWS = [stationary, a_maximum, linear, order_is_irrelevant, a_weight_is_copies, interface]


def caught(owner: Any, method: str, wrong: Callable[[Any], Any], test: Callable[[], None]) -> None:
    """`test` fails while the owner's method is what `wrong` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, wrong(getattr(owner, method)))
        with pytest.raises(AssertionError):
            test()
