"""A prior from a bare function: with the Gaussian's log-density it is the Gaussian."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import PLAIN, classification_clients, close, normal, redraw
from fedprior import Params, inference, posteriors, priors, tree
from fedprior.codecs import Dense
from fedprior.core import Stats
from fedprior.rng import generator


def gaussian(precision: float):
    def log_prob(eta, phi: Params) -> torch.Tensor:
        return -0.5 * precision * sum(((phi[k] - m) ** 2).sum() for k, m in eta.mean.items())

    return log_prob


class Scaled(NamedTuple):
    """phi ~ N(mean, exp(log_scale)^2), both learned."""

    mean: Params
    log_scale: Params


def scaled(params: Params) -> Scaled:
    return Scaled(params, tree.map(torch.zeros_like, params))


def scaled_log_prob(eta: Scaled, phi: Params) -> torch.Tensor:
    terms = tree.map(lambda m, s, p: -0.5 * ((p - m) / s.exp()) ** 2 - s, eta.mean, eta.log_scale, phi)
    return tree.total(terms)


@pytest.mark.parametrize("precision", [0.5, 4.0])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_gaussians_density_gives_the_gaussians_run(precision: float, weighting: str) -> None:
    """With rate 1/precision the gradient step is the exact M-step, so the trajectories are the same."""
    clients, model = classification_clients((4, 11, 6, 8)), fp.models.mlp(4, (5,), 3)
    e_step = inference.Point(0.1, 2, 4)
    custom = priors.Custom(gaussian(precision), rate=1 / precision)
    for rounds in (1, 4):
        a, b = (
            fp.run(fp.Algorithm(p, e_step, weighting=weighting), model, clients, rounds=rounds, cohort=3).params
            for p in (custom, priors.Gaussian(precision))
        )
        assert close(a, b, 1e-6)
    assert not close(a, dict(model.named_parameters()), 1e-2)


def test_statistics_are_the_gradient_of_the_sum() -> None:
    """The sum of the clients' messages is autograd's gradient of the summed log_prob."""
    prior = priors.Custom(scaled_log_prob, make_eta=scaled)
    rng = generator(0, "custom")
    eta = Scaled(normal(rng, PLAIN), normal(rng, PLAIN))
    clients = [normal(rng, PLAIN) for _ in range(4)]
    messages = [prior.message(eta, posteriors.Point(phi)) for phi in clients]
    summed = messages[0] + messages[1] + messages[2].weighted(2.0) + messages[3]
    leaves = {k: v.clone().requires_grad_() for k, v in tree.flatten(eta).items()}
    weighted = zip((1, 1, 2, 1), clients, strict=True)
    objective = sum(w * scaled_log_prob(tree.unflatten(eta, leaves), phi) for w, phi in weighted)
    grads = torch.autograd.grad(objective, list(leaves.values()))
    assert close(dict(summed["gradient"]), dict(zip(leaves, grads, strict=True)))
    assert summed.clients == 5 and summed.terms.keys() == set(prior.uplink)
    new = prior.m_step(eta, summed)
    step = {k: v + g / 5 for (k, v), g in zip(tree.flatten(eta).items(), grads, strict=True)}
    assert close(tree.flatten(new), step)


def test_small_steps_climb() -> None:
    """Generalised EM: over fixed clients each step raises the sum of log_prob, up to its closed-form maximum."""
    prior = priors.Custom(scaled_log_prob, rate=0.3, make_eta=scaled)
    rng = generator(1, "custom")
    clients = [{k: v + 1 for k, v in normal(rng, PLAIN).items()} for _ in range(6)]
    eta, values = prior.init(normal(rng, PLAIN)), []
    for _ in range(300):
        values.append(float(sum(scaled_log_prob(eta, phi) for phi in clients)))
        messages = [prior.message(eta, posteriors.Point(phi)) for phi in clients]
        eta = prior.m_step(eta, sum(messages[1:], messages[0]))
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values[5:]))
    stacked = {k: torch.stack([phi[k] for phi in clients]) for k in PLAIN}
    assert close(eta.mean, {k: v.mean(0) for k, v in stacked.items()}, 1e-6)
    assert close(eta.log_scale, {k: v.std(0, correction=0).log() for k, v in stacked.items()}, 1e-6)


def test_an_eta_of_ones_own_runs() -> None:
    """Two fields travel, both move, and the clients' phi become more probable than under the first eta."""
    clients, model = classification_clients((8, 9, 10)), fp.models.mlp(4, (5,), 3)
    prior = priors.Custom(scaled_log_prob, rate=0.3, make_eta=scaled)
    algorithm = fp.Algorithm(prior, inference.Point(0.05, 1, 4))
    result = fp.run(algorithm, model, clients, rounds=15)
    first = prior.init(dict(model.named_parameters()))
    assert result.eta._fields == ("mean", "log_scale")
    assert not close(result.eta.mean, first.mean, 1e-3) and not close(result.eta.log_scale, first.log_scale, 1e-1)
    values = 2 * sum(v.numel() for v in first.mean.values())
    assert all(r.bytes_up == r.bytes_down == 3 * (32 + 4 * values) for r in result.history)
    phi = fp.run(fp.Algorithm(priors.Gaussian(), inference.Point(0.05, 1, 4)), result.model(), clients, rounds=1).params
    assert scaled_log_prob(result.eta, phi) > scaled_log_prob(first, phi)


def test_server_steps_apply() -> None:
    clients, model = classification_clients((8, 9)), fp.models.softmax(4, 3)
    algorithm = fp.Algorithm(priors.Custom(gaussian(1.0)), inference.Point(0.1), fp.server.Damped(0.5))
    full = fp.Algorithm(priors.Custom(gaussian(1.0), rate=0.5), inference.Point(0.1))
    a, b = (fp.run(alg, model, clients, rounds=3).params for alg in (algorithm, full))
    assert close(a, b, 1e-6)


class Weights(NamedTuple):
    """An eta that says `weights` where the library would look for `mean`."""

    weights: Params


def shifted(eta: Weights, phi: Params) -> torch.Tensor:
    return -0.5 * tree.total(tree.map(lambda m, p: (p - m) ** 2, eta.weights, phi))


def test_an_eta_without_a_mean_needs_to_point() -> None:
    clients, model = classification_clients((4,)), fp.models.softmax(4, 3)
    e_step = inference.Point(0.1)
    with pytest.raises(TypeError, match=r"Weights has no field `mean`: pass to_point"):
        fp.run(fp.Algorithm(priors.Custom(shifted, make_eta=Weights), e_step), model, clients, rounds=1)
    prior = priors.Custom(shifted, make_eta=Weights, to_point=lambda eta: eta.weights)
    result = fp.run(fp.Algorithm(prior, e_step), model, clients, rounds=2)
    want = fp.run(fp.Algorithm(priors.Custom(gaussian(1.0)), e_step), model, clients, rounds=2)
    assert close(result.params, want.params, 1e-6)


def test_log_prob_is_for_one_client() -> None:
    prior = priors.Custom(gaussian(1.0))
    with pytest.raises(ValueError, match="sum of 3"):
        prior.log_prob(prior.init(PLAIN), Stats({"phi": PLAIN}, 3.0))


@pytest.mark.parametrize(
    ("value", "got"), [(torch.ones(3), r"shape \(3,\)"), (torch.ones(1), r"shape \(1,\)"), (1.0, "float")]
)
def test_a_function_must_return_one_number(value: Any, got: str) -> None:
    prior = priors.Custom(lambda eta, phi: value)
    for call in (
        lambda: prior.log_prob(prior.init(PLAIN), Stats({"phi": PLAIN})),
        lambda: prior.message(prior.init(PLAIN), posteriors.Point(PLAIN)),
    ):
        with pytest.raises(TypeError, match=f"one number, in nats, got {got}: sum it"):
            call()


def test_a_field_that_the_function_ignores_stays() -> None:
    """No gradient is a gradient of zero, not an error."""
    clients, model = classification_clients((4, 5)), redraw(nn.Linear(4, 3).double())
    clients = [fp.Client(c.index, c.name, fp.Examples(c.train.x.double(), c.train.y)) for c in clients]
    prior = priors.Custom(gaussian(1.0), make_eta=scaled)
    result = fp.run(fp.Algorithm(prior, inference.Point(0.1), codec=Dense("float64")), model, clients, rounds=2)
    assert all(not v.any() for v in result.eta.log_scale.values())
    assert not close(result.eta.mean, dict(model.named_parameters()), 1e-3)
