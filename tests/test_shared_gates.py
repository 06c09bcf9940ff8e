"""Gates by evidence: what a unit is worth to a client, and what the server makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import CONV, IMAGES, bound, close, equal, image_clients, normal
from coupled_nets import norm_net
from fedprior import Client, Examples, Stats, inference, priors, structure, tree
from fedprior.inference.gains import _look
from fedprior.objective import Objective
from fedprior.rng import generator
from test_slim import MODELS, setting


def shared(density: float = 0.3, start: float = 1.0, steps: int = 4, hold: int = 0, **fields) -> priors.SharedGates:
    return priors.SharedGates(density, start, steps, hold=hold, **fields)


@pytest.mark.parametrize("name", MODELS)
def test_slopes_are_the_gradient_by_the_gates(name: str) -> None:
    """d/dz_g at z = 1 of the log-likelihood of phi * z, by autograd through the gates."""
    model, x, cut, params = setting(name)
    objective = Objective(model)
    *places, classes = objective.outputs(params, x).shape
    y = torch.arange(math.prod(places)).view(places) % classes
    z = {g.name: torch.ones(g.units, dtype=torch.float64, requires_grad=True) for g in cut.groups}
    value = objective.log_lik(structure.close_gates(cut.groups, z, params), x, y)
    expected = dict(zip(z, torch.autograd.grad(value, list(z.values())), strict=True))
    phi = {k: v.clone().requires_grad_(k in objective.trainable) for k, v in params.items()}
    objective.log_lik(phi, x, y).backward()
    look = _look(objective, cut.groups, phi)
    for slopes in (look(), look()):  # the first call may be recorded, and the second run from the record
        for group, found in zip(cut.groups, slopes, strict=True):
            assert float(found.abs().max()) > 0
            assert torch.allclose(found, expected[group.name], rtol=1e-10, atol=1e-12)


def gaussian_client(size: int) -> tuple[nn.Module, Client]:
    """Targets of a linear network of independent units plus noise of variance one."""
    rng = generator(0, "gaussian")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.copy_(torch.tensor([[0.3, 0.6, 0.0, 0.45]]))
    x = torch.randn(size, 4, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        y = model(x) + torch.randn(size, 1, generator=rng, dtype=torch.float64)
    return model, Client(0, "gaussian", Examples(x, y))


def test_the_gain_is_what_closing_the_unit_costs() -> None:
    """A quadratic log-likelihood, for which the second order is all: N a^2 / 2 nats for a unit of weight a."""
    size = 20000
    model, client = gaussian_client(size)
    prior = shared().bind(model, client.train.x)
    objective = Objective(model, "regression")
    eta = prior.init(objective.params())
    q, state = inference.Gains(1e-9, 1, 10).e_step(objective, prior, eta, client, None, generator(1, "e"))
    (group,) = prior.groups
    whole = objective.log_lik(eta.mean, client.train.x, client.train.y)
    for unit in range(4):
        z = {group.name: torch.ones(4, dtype=torch.float64)}
        z[group.name][unit] = 0
        closed = objective.log_lik(structure.close_gates(prior.groups, z, eta.mean), client.train.x, client.train.y)
        exact = size * float(whole - closed)
        a = float(eta.mean["1.weight"][0, unit])
        assert exact == pytest.approx(size * a**2 / 2, abs=0.05 * size * 0.6**2)
        assert float(q.gain[group.name][unit]) == pytest.approx(exact, abs=0.06 * size * 0.6**2)
    assert state is None and float(q.gain[group.name][2]) < 1e-9


@pytest.mark.parametrize("batch_size", [None, 2, 3, 20])
def test_a_batch_counts_with_its_examples(batch_size: int | None) -> None:
    """N/2 times the mean over batches of B (dL/dz)^2, each before its step; the last batch is smaller, or the one."""
    model, client = gaussian_client(5)
    prior, objective = shared().bind(model, client.train.x), Objective(model, "regression")
    eta, rng = prior.init(objective.params()), generator(1, "e")
    q, _ = inference.Gains(0.1, 2, batch_size).e_step(objective, prior, eta, client, None, generator(1, "e"))
    torch.randint(2**62, (), generator=rng)  # the seed that is lent to dropout
    terms, w = [], eta.mean
    for index in (i for _ in range(2) for i in torch.randperm(5, generator=rng).split(batch_size or 5)):
        leaf = {k: v.detach().requires_grad_() for k, v in [("z", torch.ones_like(q.gain["0"])), *w.items()]}
        phi = structure.close_gates(prior.groups, {"0": leaf["z"]}, leaf)
        value = objective.log_lik({k: phi[k] for k in w}, client.train.x[index], client.train.y[index])
        slope, *grads = torch.autograd.grad(value, list(leaf.values()))
        terms.append(len(index) * slope**2)
        w = {k: v + 0.1 * g for (k, v), g in zip(w.items(), grads, strict=True)}
    assert torch.allclose(q.gain["0"], 2.5 * torch.stack(terms).mean(0), rtol=1e-6) and close(q.phi, w)


@pytest.mark.parametrize("precision", [0.0, 30.0])
def test_training_is_sgd_on_what_is_left(precision: float) -> None:
    """The weights are those of the E-step of FedAvg, or FedProx, on the slim model, and there are no others."""
    client = image_clients(1, 24)[0]
    model = fp.models.lenet((4, 5), 6, 4, 16)
    prior = shared(start=0.5, precision=precision).bind(model, client.train.x)
    objective = Objective(model)
    eta = prior.init(objective.params())
    cut = prior.cut(eta)
    assert cut.removed
    q, _ = inference.Gains(0.1, 2, 8).e_step(objective, prior, eta, client, None, generator(0, "e"))
    small = objective.cut(cut)
    gaussian = priors.Gaussian(precision)
    plain, _ = inference.Point(0.1, 2, 8).e_step(
        small, gaussian, gaussian.init(eta.mean), client, None, generator(0, "e")
    )
    assert equal(eta.mean, cut.gather(objective.params())) and close(q.phi, plain.phi, 0.0 if precision == 0 else 1e-6)
    for g, z in eta.keep.items():
        assert len(q.gain[g]) == z.sum() and q.gain[g].any() and (q.gain[g] >= 0).all()


def test_the_e_step_needs_a_prior_with_gates_and_the_prior_gains() -> None:
    clients, model = image_clients(1, 12), fp.models.lenet((3, 3), 4, 4, 16)
    with pytest.raises(TypeError, match=r"inference.Gains needs a prior.*SharedGates"):
        fp.run(fp.Algorithm(priors.Gaussian(), inference.Gains(0.1)), model, clients, rounds=1)
    with pytest.raises(TypeError, match=r"SharedGates needs a posterior with gains.*inference.Gains"):
        fp.run(fp.Algorithm(shared(), inference.Point(0.1)), model, clients, rounds=4)


FIELDS = bound(shared(memory=0.25), CONV, IMAGES)
PRIOR: priors.SharedGates = FIELDS["prior"]


def step(prior: priors.SharedGates, eta, gain, clients: float = 1.0):
    """A round in which the clients send back the weights that they got; `gain` is of all units."""
    total = Stats({"phi": eta.mean, "gain": prior.cut(eta).units(gain)}).weighted(clients)
    return prior.project(prior.m_step(eta, total), eta)


def ramp(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = generator(seed, "ramp")
    return {g.name: 0.1 + torch.rand(g.units, generator=rng, dtype=torch.float64) for g in PRIOR.groups}


def left(prior: priors.SharedGates, eta) -> int:
    return tree.size(eta.mean)


@pytest.mark.parametrize("hold", [0, 2])
def test_the_schedule_holds_then_is_geometric_and_ends_at_the_density(hold: int) -> None:
    prior = replace(PRIOR, hold=hold)
    eta = prior.init(normal(generator(0, "eta"), FIELDS["params"]))
    total = tree.size(eta.mean)
    counts = [left(prior, eta)]
    for _ in range(8):
        settled = float(eta.round["t"]) >= hold + 4
        assert prior.settled(eta) == settled
        assert all(bool(gain.any()) != settled for gain in prior.full(eta).gain.values())  # settled: none are sent
        eta = step(prior, eta, ramp())
        counts.append(left(prior, eta))
    assert counts[: hold + 1] == [total] * (hold + 1)
    for t in range(1, 5):
        assert counts[hold + t] <= 0.3 ** (t / 4) * total < counts[hold + t - 1]
    assert counts[hold + 4 :] == [counts[hold + 4]] * (5 - hold)


NETS = {
    "lenet": (fp.models.lenet(), torch.zeros(1, 1, 28, 28)),
    "mlp": (fp.models.mlp(32, (200, 100), 10), torch.zeros(1, 32)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("density", [0.05, 0.2])
@pytest.mark.parametrize("rounds", [9, 30, 100])
def test_the_density_is_met_early_and_no_layer_is_lost(name: str, density: float, rounds: int) -> None:
    """By two thirds of the run, whatever clients say; no round has more than the plan said."""
    model, x = NETS[name]
    prior, params = priors.SharedGates(density).scheduled(rounds).bind(model, x), Objective(model).params()
    eta, rng = prior.init(params), generator(rounds, "gains")
    wanted = density * sum(p.numel() for p in model.parameters())
    plan, counts, prices = prior.schedule(params, rounds), [], []
    for _ in range(rounds):
        counts.append(prior.live(eta))
        eta = step(prior, eta, {g: torch.rand(z.shape, generator=rng) for g, z in eta.keep.items()})
        prices.append(float(eta.price["lambda_0"]))
        assert all(z.any() for z in eta.keep.values())
    hold, steps = int(0.45 * rounds), max(1, rounds // 5)
    assert 1.4 * wanted < counts[0] <= 1.55 * wanted
    assert all(count <= planned for count, planned in zip(counts, plan, strict=True))
    assert counts[: hold + 1] == plan[: hold + 1] == counts[:1] * (hold + 1)
    assert plan[hold + steps] == pytest.approx(wanted)
    assert hold + steps <= 2 * rounds // 3 and plan[hold + steps - 1] > wanted
    assert all(0.9 * wanted < count <= wanted for count in counts[2 * rounds // 3 :])
    assert max(prices[:hold]) == 0 and min(prices[hold + steps :]) > 0


def test_a_model_that_is_already_small_enough_is_left_alone() -> None:
    model, x = NETS["mlp"]
    prior = priors.SharedGates(1.0).scheduled(4).bind(model, x)
    eta = prior.init(Objective(model).params())
    after = step(prior, eta, {g: torch.rand(z.shape, generator=generator(0, "g")) for g, z in eta.keep.items()})
    assert all(z.all() for z in after.keep.values()) and float(after.price["lambda_0"]) == 0


def test_gains_are_remembered() -> None:
    """e = memory * e + (1 - memory) * mean over clients, and no memory of removed units."""
    eta = PRIOR.init(FIELDS["params"])
    first, second = ramp(1), ramp(2)
    one = step(PRIOR, eta, first, clients=3.0)
    two = step(PRIOR, one, second, clients=5.0)
    for g, z in two.keep.items():
        expected = 0.25 * (0.75 * first[g]) + 0.75 * second[g]
        assert torch.allclose(two.gain[g], expected[z > 0])
    assert not all(z.all() for z in two.keep.values())


def test_units_are_chosen_by_what_is_remembered() -> None:
    """One quiet round changes nothing but the scale of the gains."""
    eta, first, quiet = PRIOR.init(FIELDS["params"]), ramp(1), tree.map(lambda v: 1e-9 * v, ramp(2))
    forgetful = replace(PRIOR, memory=0.0)
    wanted, other = (step(forgetful, eta, gain).keep for gain in (first, quiet))
    assert equal(step(PRIOR, eta._replace(gain=first), quiet).keep, wanted) and not equal(wanted, other)


def test_buffers_are_not_counted() -> None:
    model = norm_net().double()
    prior = shared().bind(model, IMAGES)
    assert prior.live(prior.init(Objective(model).params())) == sum(p.numel() for p in model.parameters())


def test_a_removed_unit_stays_removed_whatever_clients_send() -> None:
    eta = PRIOR.init(normal(generator(0, "eta"), FIELDS["params"]))
    for _ in range(4):
        eta = step(PRIOR, eta, ramp())
    loud, wild = tree.map(lambda g: torch.full_like(g, 1e9), eta.gain), tree.map(torch.ones_like, eta.mean)
    moved = PRIOR.m_step(eta, Stats({"phi": wild, "gain": loud}))
    after = PRIOR.project(moved._replace(keep=tree.map(torch.ones_like, eta.keep)), eta)
    assert equal(after.keep, eta.keep) and not all(z.all() for z in eta.keep.values()) and equal(after.mean, wild)
    on = structure.alive(PRIOR.groups, eta.keep, FIELDS["params"])
    assert equal(structure.apply(on, PRIOR.point(after)), PRIOR.point(after))


def test_without_evidence_nothing_is_removed() -> None:
    eta = PRIOR.init(FIELDS["params"])
    nothing = tree.map(torch.zeros_like, eta.keep)
    assert equal(step(PRIOR, eta, nothing).keep, eta.keep)


def test_units_without_any_gain_go_first_and_for_nothing() -> None:
    """A price of zero moves nothing but the gates: the last price stays."""
    eta = PRIOR.init(FIELDS["params"])._replace(price={"lambda_0": torch.tensor(7.0, dtype=torch.float64)})
    group = PRIOR.groups[-1].name
    gain = ramp() | {group: torch.zeros(PRIOR.groups[-1].units, dtype=torch.float64)}
    after = step(replace(PRIOR, density=0.9), eta, gain)
    assert all(z.all() == (g != group) for g, z in after.keep.items()) and float(after.price["lambda_0"]) == 7


def test_a_silent_round_goes_on_by_what_is_remembered() -> None:
    """A chain of silent rounds leaves what one answered round would have left so late, weights and gains included."""
    eta = step(PRIOR, PRIOR.init(normal(generator(0, "eta"), FIELDS["params"])), ramp(1))
    late = eta._replace(round={"t": eta.round["t"] + 2})
    idle = eta
    for _ in range(3):
        idle = PRIOR.idle(idle)
    assert float(idle.round["t"]) == 4 and PRIOR.settled(idle) and not PRIOR.settled(eta)
    assert left(PRIOR, idle) <= 0.3 * tree.size(FIELDS["params"]) < left(PRIOR, eta)
    answered = step(replace(PRIOR, memory=0.0), late, PRIOR.cut(eta).all_units(eta.gain))
    assert equal(idle.keep, answered.keep) and equal(idle.mean, answered.mean) and equal(idle.gain, answered.gain)
    assert equal(PRIOR.idle(idle).keep, idle.keep)


def test_without_evidence_a_silent_round_removes_nothing() -> None:
    eta = PRIOR.init(FIELDS["params"])
    idle = PRIOR.idle(PRIOR.idle(eta))
    assert equal(idle.keep, eta.keep) and equal(idle.mean, eta.mean) and float(idle.round["t"]) == 2


@pytest.mark.parametrize("steps", [None, 3])
def test_a_prior_without_a_schedule_says_what_to_give(steps: int | None) -> None:
    prior = priors.SharedGates(0.3, 0.5, steps).bind(CONV, IMAGES)
    eta = PRIOR.init(FIELDS["params"])
    for call in (lambda: prior.init(eta.mean), lambda: prior.settled(eta), lambda: prior.schedule(eta.mean, 3)):
        with pytest.raises(
            ValueError, match=r"no schedule yet: give density, start, hold and steps, or call scheduled"
        ):
            call()


BAD = [{"density": 0.0}, {"density": 0.5, "start": 0.4}, {"steps": 0}, {"memory": 1.0}, {"hold": -1}]


@pytest.mark.parametrize("bad", [*BAD, {"activations": -0.1}, {"precision": float("inf")}])
def test_bad_arguments_are_refused(bad) -> None:
    words = {"density": "density is a fraction", "start": "start is the density"}.get(
        list(bad)[-1], "SharedGates needs"
    )
    with pytest.raises(ValueError, match=words):
        shared(**bad)
