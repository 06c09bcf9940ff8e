"""The E-step with gates: the gate's law, the bound and its gradient, and what is sent."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedprior as fp
from cases import CONV, IMAGES, Case, bound, classification_clients, everywhere, expected_gates, normal, total
from fedprior import Client, Examples, gates, inference, posteriors, structure, tree
from fedprior.inference import gated as module
from fedprior.objective import Objective
from fedprior.priors import Gaussian, SpikeSlab
from fedprior.rng import generator

CASE = Case("conv", **bound(SpikeSlab(0.05, 3.0), CONV, IMAGES), posterior=expected_gates)
LOG_ALPHA = torch.linspace(-gates.BOUND, gates.BOUND, 9, dtype=torch.float64)


def image_client(examples: int = 6) -> Client:
    rng = generator(0, "images")
    x = torch.randn(examples, 1, 8, 8, generator=rng, dtype=torch.float64)
    return Client(0, "c", Examples(x, torch.randint(3, (examples,), generator=rng)))


def test_keep_probability_against_monte_carlo() -> None:
    """P(z > 0) and the ends of z, from 200,000 draws a value: within 5 standard errors."""
    draws = 200_000
    u = torch.rand(draws, len(LOG_ALPHA), generator=generator(0, "u"), dtype=torch.float64)
    z = gates.hard_concrete(LOG_ALPHA, u)
    pi = gates.keep_probability(LOG_ALPHA)
    error = (pi * (1 - pi) / draws).sqrt()
    assert (((z > 0).double().mean(0) - pi).abs() < 5 * error).all()
    assert ((z >= 0) & (z <= 1)).all() and (z == 0).any() and (z == 1).any()
    assert (pi.diff() > 0).all() and pi[0] < 0.05 and pi[-1] > 0.99


def test_log_alpha_for_is_the_inverse() -> None:
    """Within the bounds on both sides; outside of them it stops there."""
    pi = gates.keep_probability(LOG_ALPHA)
    assert torch.allclose(gates.log_alpha_for(pi), LOG_ALPHA, rtol=0, atol=1e-9)
    beyond = torch.tensor([0.0, 1e-9, 1 - 1e-9, 1.0], dtype=torch.float64)
    b = gates.BOUND
    assert gates.log_alpha_for(beyond).tolist() == pytest.approx([-b, -b, b, b])


def test_gate_at_test_time_is_the_noise_free_gate() -> None:
    """It is the gate at the median of its noise, u = 1/2 at temperature 1, and closed for removed units."""
    s = torch.sigmoid(LOG_ALPHA)
    want = (s * (gates.ZETA - gates.GAMMA) + gates.GAMMA).clamp(0, 1)
    assert torch.allclose(gates.at_test_time(gates.keep_probability(LOG_ALPHA)), want, atol=1e-9)
    assert gates.at_test_time(torch.tensor([0.0, 0.3, 0.999])).tolist() == pytest.approx([0, 0, 1], abs=1e-12)


class Captured(Exception):
    """Not an error: the bound was handed out, and no training is wanted."""


def capture(prior: SpikeSlab, eta, client: Client, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    """The E-step's own bound, and the tensors that its optimisers hold."""
    found = {}

    def spy(function, data, optimizers, *rest) -> None:
        found.update(bound=function, weights=optimizers[0].param_groups[0], gates=optimizers[1].param_groups[0])
        raise Captured

    with monkeypatch.context() as patch:
        patch.setattr(module, "ascend", spy)
        with pytest.raises(Captured):
            inference.Gated(0.1, 1, None).e_step(Objective(CONV), prior, eta, client, None, rng)
    return found["bound"], found["weights"]["params"], found["gates"]["params"]


def some_eta(prior: SpikeSlab, seed: int = 0):
    rng = generator(seed, "eta")
    theta = {g.name: 0.3 + 0.6 * torch.rand(g.units, generator=rng, dtype=torch.float64) for g in prior.groups}
    return prior.Eta(
        {k: v + 0.1 * e for (k, v), e in zip(CASE.params.items(), normal(rng, CASE.params).values(), strict=True)},
        theta,
    )


def test_bound_is_the_log_likelihood_and_the_prior_per_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise: mean log-likelihood of the gated model + log_prob of expected gates / N_s."""
    prior, client, rng = CASE.prior, image_client(), generator(0, "noise")
    eta = some_eta(prior)
    function, weights, alphas = capture(prior, eta, client, rng, monkeypatch)
    with torch.no_grad():
        for i, w in enumerate(weights):
            w += 0.1 * torch.randn(w.shape, generator=generator(i, "move"), dtype=w.dtype)
    state = rng.get_state()
    value = function(client.train.x, client.train.y)
    rng.set_state(state)
    phi = dict(zip(CASE.params, weights, strict=True))
    pi = {g: gates.keep_probability(a) for g, a in zip(eta.keep, alphas, strict=True)}
    assert all(torch.allclose(pi[g], eta.keep[g]) for g in pi)
    z = {g: gates.hard_concrete(a, gates.uniform(a, rng)) for g, a in zip(eta.keep, alphas, strict=True)}
    logits = Objective(CONV).outputs(structure.close_gates(prior.groups, z, phi), client.train.x)
    log_lik = logits.log_softmax(1)[range(len(logits)), client.train.y].mean()
    term = sum((pi[g] * t.log() + (1 - pi[g]) * (1 - t).log()).sum() for g, t in eta.keep.items())
    owned = structure.owned(prior.groups, pi, phi)
    for k, on in everywhere(owned, phi).items():
        term = term - (on * (prior.lambda_0 * (k in owned) + prior.precision / 2 * (phi[k] - eta.mean[k]) ** 2)).sum()
    assert torch.allclose(value, log_lik + term / len(client.train), rtol=1e-12)
    assert abs(term.detach()) > 1


def test_gradients_of_the_bound_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, client, rng = CASE.prior, image_client(), generator(3, "noise")
    function, weights, alphas = capture(prior, some_eta(prior), client, rng, monkeypatch)
    state = rng.get_state()

    def value() -> torch.Tensor:
        rng.set_state(state)
        return function(client.train.x, client.train.y)

    leaves = [*weights, *alphas]
    grads = torch.autograd.grad(value(), leaves)
    assert sum(bool(g.abs().max() > 1e-4) for g in grads) > len(grads) / 2
    h = 1e-6
    for leaf, grad in zip(leaves, grads, strict=True):
        for index in list(np.ndindex(*leaf.shape))[:: max(1, leaf.numel() // 6)]:
            here = float(leaf.detach()[index])
            with torch.no_grad():
                leaf[index] = here + h
                up = value()
                leaf[index] = here - h
                down = value()
                leaf[index] = here
            assert float(up - down) / (2 * h) == pytest.approx(float(grad[index]), rel=1e-5, abs=1e-7)


def test_drawn_gates_are_unbiased() -> None:
    """The mean over E-steps of the drawn statistics is that of the expected gates: within 5 standard errors."""
    prior, client, steps = CASE.prior, image_client(2), 200
    eta, objective = some_eta(prior), Objective(CONV)
    still = inference.Gated(lr=1e-12, epochs=1, batch_size=None, gate_lr=1e-12)
    q, _ = replace(still, draw=False).e_step(objective, prior, eta, client, None, generator(0, "draw"))
    want, drawn = prior.stats(q), []
    for seed in range(steps):
        q, _ = still.e_step(objective, prior, eta, client, None, generator(seed, "draw"))
        assert all(((z == 0) | (z == 1)).all() for z in q.gate.values())
        drawn.append(prior.stats(q))
    for term in prior.uplink:
        for name, value in want[term].items():
            scale = q.phi[name].abs() if term == "z_phi" else torch.ones(())
            mean = sum(t[term][name] for t in drawn) / steps
            error = 0.5 * scale / math.sqrt(steps)
            assert ((mean - value).abs() <= 5 * error + 1e-9).all(), (term, name)
    assert total(drawn).clients == steps
    assert len({tuple(torch.cat(list(t["gate"].values())).tolist()) for t in drawn}) > 10


def test_removed_units_are_not_trained_and_not_sent() -> None:
    prior, client = CASE.prior, image_client()
    eta = some_eta(prior)
    eta = prior.project(eta._replace(keep={g: k * (torch.arange(len(k)) != 0) for g, k in eta.keep.items()}))
    q, state = inference.Gated(0.5, 3, 2, gate_lr=0.5).e_step(
        Objective(CONV), prior, eta, client, None, generator(0, "e")
    )
    assert state is None
    assert all(k[0] == 0 and (k[1:] > 0).all() for k in q.keep.values())
    z = everywhere(structure.alive(prior.groups, eta.keep, q.phi), q.phi)
    trained = 0
    for name, sent in prior.stats(q)["z_phi"].items():
        dead = z[name] == 0
        assert not sent[dead].any()
        assert torch.equal(q.phi[name][dead], eta.mean[name][dead])
        trained += int((q.phi[name] != eta.mean[name]).sum())
    assert trained > 20


def test_log_alpha_stays_in_its_bounds() -> None:
    """A huge gate learning rate: pi is at its ends, and never 0 or 1."""
    prior = SpikeSlab(5.0, groups=CASE.prior.groups)
    e_step = inference.Gated(0.1, 3, None, gate_lr=50.0, draw=False)
    q, _ = e_step.e_step(Objective(CONV), prior, some_eta(prior), image_client(), None, generator(0, "e"))
    low = float(gates.keep_probability(torch.tensor(-gates.BOUND, dtype=torch.float64)))
    assert all(torch.allclose(k, torch.full_like(k, low)) for k in q.keep.values())


def test_parts_that_do_not_fit_are_refused_before_round_one() -> None:
    clients, model = classification_clients((4, 4)), fp.models.mlp(4, (5,), 3)
    with pytest.raises(TypeError, match=r"inference.Gated needs a prior with gates.*inference.Point"):
        fp.run(fp.Algorithm(Gaussian(), inference.Gated(0.1)), model, clients, rounds=1)
    with pytest.raises(TypeError, match=r"SpikeSlab needs a posterior with gates.*inference.Gated"):
        fp.run(fp.Algorithm(SpikeSlab(0.1), inference.Point(0.1)), model, clients, rounds=1)
    assert tree.size(Objective(model).params()) == 43 and isinstance(
        CASE.posterior(CASE, generator(0)), posteriors.Gated
    )
