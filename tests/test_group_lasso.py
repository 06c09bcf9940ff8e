"""Group lasso: the proximal step is the argmin it says it is, and what it removes is gone everywhere."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fedprior as fp
from cases import classification_clients, close, equal, everywhere, image_clients, normal, pooled
from fedprior import codecs, inference, priors, server, structure, tree
from fedprior.objective import Objective
from fedprior.priors import GroupLasso
from fedprior.rng import generator
from test_slim import MODELS

WHOLE = ["mlp", "conv", "batch norm", "residual", "depthwise", "vit"]


def entries(prior: GroupLasso, eta: GroupLasso.Eta) -> dict[tuple[str, int], tuple[Tensor, float]]:
    """(group, unit) -> (the entries that it owns, how many of them are alive); straight from the gates' definition."""
    alive, found = everywhere(structure.alive(prior.groups, eta.keep, eta.mean), eta.mean), {}
    for group in prior.groups:
        for unit in range(group.units):
            gate = {g.name: torch.ones(g.units).double() for g in prior.groups}
            gate[group.name][unit] = 0.0
            owned = structure.owned(prior.groups, gate, eta.mean)
            chosen = {k: owned[k].expand_as(v) == 0 for k, v in eta.mean.items() if k in owned}
            w = torch.cat([eta.mean[k][mask] for k, mask in chosen.items()])
            live = torch.cat([alive[k][mask] for k, mask in chosen.items()])
            found[group.name, unit] = w, float((live > 0).sum())
    return found


def setting(name: str, strength: float = 0.3, some_gone: bool = False) -> tuple[GroupLasso, GroupLasso.Eta]:
    """Random weights, whose scale differs from unit to unit: some norms below the threshold, some above."""
    make, shape = MODELS[name]
    model, rng = make().double(), generator(0, name)
    prior = GroupLasso(strength).bind(model, torch.zeros(1, *shape, dtype=torch.float64))
    scale = {g.name: torch.linspace(0.02, 1.5, g.units).double() for g in prior.groups}
    eta = prior.init(structure.close_gates(prior.groups, scale, normal(rng, Objective(model).params())))
    if some_gone:
        keep = {g: (torch.arange(len(k)) != len(k) - 1).double() for g, k in eta.keep.items()}
        eta = prior.Eta(structure.apply(structure.alive(prior.groups, keep, eta.mean), eta.mean), keep)
    return prior, eta


def subgradient(prior: GroupLasso, v: GroupLasso.Eta, w: GroupLasso.Eta) -> dict[tuple[str, int], float]:
    """How far 0 is from the subdifferential of (1/2)|w - v|^2 + sum_g strength sqrt(|g|) |w_g|, unit by unit."""
    distance, after = {}, entries(prior, w)
    for unit, (v_u, size) in entries(prior, v).items():
        w_u, tau = after[unit][0], prior.strength * size**0.5
        if w_u.any():
            distance[unit] = float((w_u - v_u + tau * w_u / w_u.norm()).abs().max())
        else:
            distance[unit] = max(0.0, float(v_u.norm()) - tau)
    return distance


@pytest.mark.parametrize("some_gone", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_the_proximal_step_is_stationary(name: str, some_gone: bool) -> None:
    prior, v = setting(name, some_gone=some_gone)
    w = prior.prox(v)
    assert max(subgradient(prior, v, w).values()) < 1e-10
    gone = sum(int((k == 0).sum()) for k in w.keep.values())
    assert gone > sum(int((k == 0).sum()) for k in v.keep.values())
    assert all(k.any() for k in w.keep.values())
    owned = structure.owned(prior.groups, v.keep, v.mean)
    assert all(torch.equal(w.mean[k], v.mean[k]) for k in v.mean if k not in owned)


class NoSquareRoot(GroupLasso):
    """tau = strength |g|."""

    def _factor(self, norm, size, keep):
        return super()._factor(norm, size**2, keep)


class Lasso(GroupLasso):
    """Entry by entry: no unit as a whole."""

    def prox(self, eta):
        return eta._replace(mean=tree.map(lambda v: v.sign() * (v.abs() - self.strength).clamp(min=0), eta.mean))


@pytest.mark.parametrize("wrong", [NoSquareRoot, Lasso])
def test_the_condition_catches_another_step(wrong: type[GroupLasso]) -> None:
    prior, v = setting("conv")
    w = wrong(prior.strength, groups=prior.groups).prox(v)
    assert max(subgradient(prior, v, w).values()) > 1e-3


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_no_weights_nearby_are_better(name: str) -> None:
    prior, v = setting(name)

    def objective(mean: fp.Params) -> float:
        penalty = sum(
            prior.strength * size**0.5 * w.norm() for w, size in entries(prior, v._replace(mean=mean)).values()
        )
        return float(0.5 * tree.total(tree.map(lambda w, v: (w - v) ** 2, mean, v.mean)) + penalty)

    w, rng = prior.prox(v).mean, generator(0, "near")
    best = objective(w)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(5):
            assert objective(tree.map(lambda w, e, size=size: w + size * e, w, normal(rng, w))) > best
    assert objective(v.mean) > best


@pytest.mark.parametrize("name", WHOLE)
def test_the_root_mean_square_falls_by_the_strength(name: str) -> None:
    prior, v = setting(name)
    w = entries(prior, prior.prox(v))
    for unit, (v_u, size) in entries(prior, v).items():
        want = max(0.0, float(v_u.norm()) / size**0.5 - prior.strength)
        assert float(w[unit][0].norm()) / size**0.5 == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", WHOLE)
def test_a_group_keeps_its_best_unit(name: str) -> None:
    """However strong the prior is; its weights stay, but for those that read removed units."""
    prior, v = setting(name, strength=1e3)
    w = prior.project(v)
    rms = {unit: float(v_u.norm()) / size**0.5 for unit, (v_u, size) in entries(prior, v).items()}
    for group in prior.groups:
        best = max(range(group.units), key=lambda u, name=group.name: rms[name, u])
        assert w.keep[group.name].nonzero().flatten().tolist() == [best]
    assert equal(w.mean, structure.apply(structure.alive(prior.groups, w.keep, v.mean), v.mean))
    again = prior.project(w)
    assert equal(tree.flatten(again), tree.flatten(w))


def test_removed_units_stay_removed_whatever_arrives() -> None:
    prior, v = setting("conv", some_gone=True)
    loud = v._replace(mean=tree.map(lambda x: 100 + x, v.mean), keep=tree.map(torch.ones_like, v.keep))
    after = prior.project(loud, v)
    assert all(torch.equal(after.keep[g], k) for g, k in v.keep.items())
    on = everywhere(structure.alive(prior.groups, v.keep, v.mean), v.mean)
    assert all(not after.mean[k][z == 0].any() and after.mean[k][z > 0].all() for k, z in on.items())


def test_values_that_are_not_finite_are_not_hidden() -> None:
    """The run keeps its eta then; it has to see them."""
    prior, v = setting("mlp")
    for bad in (torch.nan, torch.inf):
        mean = tree.map(torch.clone, v.mean)
        next(iter(mean.values()))[3, 0] = bad
        assert not all(bool(x.isfinite().all()) for x in prior.project(v._replace(mean=mean), v).mean.values())


@pytest.mark.parametrize("fields", [{"strength": -1.0}, {"strength": torch.inf}, {"strength": 0.1, "precision": -1.0}])
def test_what_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be a finite number >= 0, got (-1\.0|inf)"):
        GroupLasso(**fields)


@pytest.mark.parametrize("precision", [0.0, 5.0])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_clients_train_the_slim_model(name: str, precision: float) -> None:
    """What they send is what training the whole model with its removed units at zero would give."""
    prior, v = setting(name, some_gone=True)
    prior = replace(prior, precision=precision)
    rng, (make, shape) = generator(0, "x"), MODELS[name]
    x = torch.randn(12, *shape, generator=rng, dtype=torch.float64)
    client, point = fp.Client(0, "c", fp.Examples(x, torch.arange(12) % 3)), inference.Point(0.01, 2, 5)
    objective = Objective(make().double())
    q, _ = point.e_step(objective, prior, v, client, None, generator(0, "e"))
    gaussian = priors.Gaussian(precision)
    whole, _ = point.e_step(objective, gaussian, gaussian.Eta(v.mean), client, None, generator(0, "e"))
    assert close(q.phi, whole.phi, 1e-10)
    assert not close(q.phi, v.mean, 1e-4)
    assert objective._smaller is not None and objective._smaller[0] == prior.cut(v)  # which it trained


def run(strength: float, **fields) -> fp.Result:
    clients = image_clients(3, 40)
    algorithm = replace(fp.grouplasso(lr=0.1, strength=strength, epochs=4, batch_size=8), **fields)
    return fp.run(algorithm, fp.models.lenet((6, 8), 16, 4, 16), clients, rounds=10, test=pooled(clients))


def test_without_strength_it_is_fedavg() -> None:
    clients, model = classification_clients((6, 5, 9)), fp.models.mlp(4, (6,), 3)
    lasso = fp.run(fp.grouplasso(lr=0.1, strength=0.0), model, clients, rounds=4, cohort=2)
    assert equal(lasso.params, fp.run(fp.fedavg(lr=0.1), model, clients, rounds=4, cohort=2).params)


def test_units_go_and_bytes_with_them() -> None:
    """In both directions; the module given back is the small one, and computes what the whole one does."""
    result = run(0.014)
    left = [r.parameters_left for r in result.history]
    assert left == sorted(left, reverse=True) and left[-1] < 0.5 * result.parameters
    fell = [i for i in range(1, len(left) - 1) if left[i] < left[i - 1]]
    assert fell
    for i in fell:
        before, after = result.history[i], result.history[i + 1]
        assert after.bytes_down < before.bytes_down and after.bytes_up < before.bytes_up
    for a, b in itertools.pairwise(result.history):
        assert b.bytes_down <= a.bytes_down and b.bytes_up <= a.bytes_up
    assert result.accuracy > 0.8  # four bright corners; guessing is 0.25
    small, whole, x = result.model(), result.objective.module(result.params), pooled(image_clients(3, 40)).x
    assert sum(p.numel() for p in small.parameters()) == result.parameters_left
    assert torch.allclose(small(x), whole(x), atol=1e-5)


@pytest.mark.parametrize("part", [{"server": server.Momentum(1.0, 0.9)}, {"codec": codecs.Sparse("int4")}], ids=str)
def test_removed_units_stay_removed_with_other_parts(part: dict) -> None:
    """A server's momentum, and values that are rounded on the wire, bring nothing back."""
    result = run(0.014, **part)
    left = [r.parameters_left for r in result.history]
    assert left == sorted(left, reverse=True) and left[-1] < left[0]
    alive = everywhere(structure.alive(result.algorithm.prior.groups, result.eta.keep, result.params), result.params)
    assert all(not v[alive[k] == 0].any() for k, v in result.params.items())
    assert not any(r.kept_eta for r in result.history)
