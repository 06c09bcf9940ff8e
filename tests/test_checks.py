"""What is refused before round one, and what is said when a run goes wrong without an error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, normal
from fedprior import inference, posteriors, priors, records, server, tree
from fedprior.codecs import Dense
from fedprior.metrics import evaluate
from fedprior.objective import Objective
from fedprior.rng import generator

CLIENTS = classification_clients((6, 7, 8))
MODEL = fp.models.softmax(4, 3)
TEST = CLIENTS[0].train


def arguments(**changes) -> dict:
    given = {"algorithm": fp.fedavg(), "model": MODEL, "clients": CLIENTS, "rounds": 1, "test": TEST}
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"algorithm": "fedavg"}, TypeError, "algorithm must be an Algorithm"),
        ({"algorithm": fp.fedavg}, TypeError, "algorithm must be an Algorithm"),
        ({"model": nn.Linear}, TypeError, "model must be an instance"),
        ({"clients": TEST}, TypeError, "clients must be a population"),
        ({"clients": [TEST]}, TypeError, r"clients\[0\] must be a fedprior.Client"),
        ({"clients": [CLIENTS[0], CLIENTS[0]]}, ValueError, "same index"),
        ({"availability": 0.3}, TypeError, "availability must be"),
        ({"test": (TEST.x, TEST.y)}, TypeError, "test must be"),
        ({"test": fp.Examples(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))}, ValueError, "test.* are empty"),
        ({"test": fp.Examples(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))}, ValueError, "fit the test"),
        ({"test": replace(TEST, y=TEST.y + 3)}, ValueError, "run from .* to .*, and the model has 3 outputs"),
        ({"test": replace(TEST, y=TEST.y - 100)}, ValueError, "run from -100"),
        ({"test": replace(TEST, y=torch.eye(3)[TEST.y])}, ValueError, "class indices"),
        ({"device": "nowhere"}, ValueError, "device 'nowhere' cannot be used here"),
        ({"rounds": 2.5}, ValueError, "whole number"),
        ({"seed": None}, ValueError, "seed must be"),
        ({"resume": True}, ValueError, "needs out="),
        ({"loss": nn.CrossEntropyLoss()}, TypeError, "log-likelihood"),
        ({"loss": lambda o, y: -nn.functional.cross_entropy(o, y)}, ValueError, "per example"),
        ({"model": MODEL.__class__(nn.Linear(4, 3)).requires_grad_(False)}, ValueError, "nothing to train"),
    ],
)
def test_refused_before_round_one(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.run(**arguments(**changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("uplink", "phi", r"must be a tuple of names, got the string 'phi': write \('phi',\)"),
        ("init", lambda params: params, "eta must be a NamedTuple of dicts of tensors, as `init` returns it, got dict"),
    ],
)
def test_a_prior_of_the_users_own_is_refused_before_round_one(name: str, value: object, message: str) -> None:
    prior = priors.Gaussian()
    object.__setattr__(prior, name, value)
    with pytest.raises(TypeError, match=message):
        fp.run(**arguments(algorithm=fp.Algorithm(prior, inference.Point(0.1))))


@pytest.mark.parametrize(
    "make",
    [
        lambda: server.Adam(lr=-1.0),
        lambda: server.Yogi(tau=0.0),
        lambda: server.Momentum(momentum=1.0),
        lambda: server.Damped(float("nan")),
        lambda: inference.Gated(0.1, gate_lr=0.0),
        lambda: inference.Point(float("nan")),
        lambda: priors.SpikeSlab(-1.0),
    ],
)
def test_impossible_parts_are_refused(make) -> None:
    with pytest.raises(ValueError, match="need"):
        make()


def test_resume_notices_other_data_another_loss_and_fewer_rounds(tmp_path) -> None:
    fp.run(**arguments(rounds=2), out=tmp_path)
    shifted = [replace(c, train=replace(c.train, x=c.train.x + 1)) for c in CLIENTS]
    for changes, key in (
        ({"clients": shifted, "rounds": 3}, "data"),
        ({"loss": lambda o, y: -nn.functional.cross_entropy(o, y, reduction="none"), "rounds": 3}, "loss"),
        ({"rounds": 1}, "has run 2 rounds"),
    ):
        with pytest.raises(ValueError, match=key):
            fp.run(**arguments(**changes), out=tmp_path, resume=True)


def test_resume_notices_another_partition_with_the_same_ends() -> None:
    examples = fp.Examples(torch.zeros(40, 4), torch.arange(40) % 3)
    prints = {fp.data.iid(examples, 4, seed).fingerprint() for seed in range(5)}
    assert len(prints) == 5 and fp.data.iid(examples, 4, 1).fingerprint() in prints


def test_a_run_without_updates_says_so() -> None:
    late = fp.run(**arguments(rounds=3), availability=fp.Availability(deadline_seconds=1e-9))
    assert "in 3 of 3 rounds the model was not updated (clients: 9 late)" in late.summary()
    diverged = fp.run(**arguments(rounds=3, algorithm=fp.fedavg(lr=3e38, batch_size=2)))
    assert "uploads were refused" in diverged.summary() and "lower the learning rate" in diverged.summary()
    assert "warning" not in fp.run(**arguments()).summary()
    assert repr(late) == f"Result({late.summary()})"


def test_a_missing_statistic_is_named() -> None:
    class Forgets(priors.Gaussian):
        uplink = ()

    with pytest.raises(KeyError, match=r"no statistic 'phi'.*uplink"):
        fp.run(**arguments(algorithm=fp.Algorithm(Forgets(), inference.Point(0.1))))


@dataclass(frozen=True)
class Coarse(Dense):
    """Rounds to whole numbers: a codec whose loss is easy to see."""

    def encode(self, message, clients):
        return super().encode(tree.map(torch.round, message), clients)


@dataclass(frozen=True)
class Seen:
    """An E-step that only hands back the eta that it saw, times ten."""

    def start(self, prior, eta) -> posteriors.Point:
        return posteriors.Point(prior.point(eta))

    def e_step(self, objective, prior, eta, client, state, rng):
        return posteriors.Point({k: 10 * v for k, v in eta.mean.items()}), state


def test_clients_train_on_what_was_decoded() -> None:
    """Without the codec in the way down, ten times 0.26 is 2.6 and would arrive as 3."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.26)
    result = fp.run(**arguments(model=model, algorithm=fp.Algorithm(priors.Gaussian(), Seen(), codec=Coarse())))
    assert all(torch.equal(v, torch.zeros_like(v)) for v in result.params.values())


@pytest.mark.parametrize("batch_size", [3, 5])
def test_the_prior_weighs_one_over_the_examples_whatever_the_batch(batch_size: int) -> None:
    """One epoch of FedProx against a plain loop whose penalty is divided by N_s, the last batch smaller."""
    client, lr, precision = CLIENTS[1], 0.1, 4.0
    objective, prior = Objective(MODEL), priors.Gaussian(precision)
    eta = prior.init({k: v + 0.5 for k, v in objective.params().items()})
    q, _ = inference.Point(lr, 1, batch_size).e_step(objective, prior, eta, client, None, generator(0, "e"))
    rng = generator(0, "e")
    torch.randint(2**62, (), generator=rng)  # the seed that is lent to dropout
    phi = {k: v.clone() for k, v in eta.mean.items()}
    for index in torch.randperm(len(client.train), generator=rng).split(batch_size):
        leaves = {k: v.clone().requires_grad_() for k, v in phi.items()}
        nll = nn.functional.cross_entropy(objective.outputs(leaves, client.train.x[index]), client.train.y[index])
        penalty = precision / 2 * sum(((leaves[k] - eta.mean[k]) ** 2).sum() for k in leaves)
        grads = torch.autograd.grad(nll + penalty / len(client.train), list(leaves.values()))
        phi = {k: phi[k] - lr * g for k, g in zip(phi, grads, strict=True)}
    assert all(torch.allclose(q.phi[k], v, atol=1e-6) for k, v in phi.items())


def test_gates_weigh_the_prior_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price in the bound does not depend on how many examples are in the batch."""
    from fedprior.inference import gated

    bounds = []
    monkeypatch.setattr(gated, "ascend", lambda bound, *rest: bounds.append(bound))
    client, model = CLIENTS[2], fp.models.mlp(4, (5,), 3)
    for lambda_0 in (0.0, 2.0):
        prior = priors.SpikeSlab(lambda_0).bind(model, client.train.x)
        rng = generator(0, "gates")
        gated.Gated(0.1).e_step(Objective(model), prior, prior.init(Objective(model).params()), client, None, rng)
    x, y = client.train.x, client.train.y
    monkeypatch.setattr(gated, "uniform", lambda like, rng: torch.full_like(like, 0.5))
    prices = [(bounds[0](x[:n], y[:n]) - bounds[1](x[:n], y[:n])).item() for n in (2, len(x))]
    owned = 5 * (4 + 1)
    assert prices == pytest.approx([0.99 * 2.0 * owned / len(x)] * 2, rel=1e-4)


def test_gated_training_moves_running_moments() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    for options in ({"lambda_0": 0.01}, {"density": 1.0}):
        result = fp.run(**arguments(model=net, algorithm=fp.fedsparse(lr=0.1, **options), rounds=1))
        assert result.params["1.running_mean"].all()


def test_evaluation_is_in_evaluation_mode_and_by_example() -> None:
    net = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Dropout(0.9), nn.Linear(30, 3))
    objective = Objective(net)
    phi = normal(generator(0, "phi"), objective.params())
    data = classification_clients((30,))[0].train
    objective.train(True)
    whole, parts = evaluate(objective, phi, data, 30).means(), evaluate(objective, phi, data, 7).means()
    assert whole == pytest.approx(parts)
    outputs = objective.module(phi)(data.x)
    assert whole["nats"] == pytest.approx(nn.functional.cross_entropy(outputs, data.y).item(), rel=1e-5)
    assert whole["accuracy"] == pytest.approx(float((outputs.argmax(1) == data.y).float().mean()))


def test_a_damaged_line_is_not_taken_for_a_torn_one(tmp_path) -> None:
    fp.run(**arguments(rounds=2), out=tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text() + '{"number": 3')
    assert len(records.read(path)) == 2
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="line 3 is not a round's record"):
        records.read(path)


def test_records_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    sync, write = records.RecordFile.sync, fp.run.__globals__["_checkpoint"]
    monkeypatch.setattr(records.RecordFile, "sync", lambda self: (order.append("sync"), sync(self)))
    monkeypatch.setitem(fp.run.__globals__, "_checkpoint", lambda *a: (order.append("checkpoint"), write(*a)))
    fp.run(**arguments(rounds=2), out=tmp_path)
    assert order == ["sync", "checkpoint"] * 2


def test_units_at_the_threshold_stay() -> None:
    prior = priors.SpikeSlab(0.1, threshold=0.25).bind(fp.models.mlp(4, (3,), 3), TEST.x)
    eta = prior.init(Objective(fp.models.mlp(4, (3,), 3)).params())
    keep = {g: torch.tensor([0.25, 0.25, 0.9]) for g in eta.keep}
    assert all(torch.equal(k, keep[g]) for g, k in prior.project(eta._replace(keep=keep)).keep.items())


def test_of_equally_bad_units_one_stays() -> None:
    prior = priors.SpikeSlab(0.1).bind(fp.models.mlp(4, (3,), 3), TEST.x)
    eta = prior.init(Objective(fp.models.mlp(4, (3,), 3)).params())
    keep = {g: torch.full_like(k, 0.05) for g, k in eta.keep.items()}
    assert all(int((k > 0).sum()) == 1 for k in prior.project(eta._replace(keep=keep)).keep.values())


def test_models_that_cannot_be_cut_everywhere() -> None:
    """Tied, parametrised and unscaled layers stay dense; frozen ones are gated; the rest of the model runs."""
    learned = {"lambda_0": 5.0, "gate_lr": 0.5, "epochs": 10}
    tied = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    tied[2].weight = tied[0].weight
    unscaled = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 5), nn.ReLU())
    unscaled.append(nn.Linear(5, 3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    parametrised = nn.Sequential(normed, nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    for model in (tied, unscaled, parametrised):
        for options in (learned, {"density": 0.6}):
            result = fp.run(fp.fedsparse(lr=0.1, **options), model, CLIENTS, rounds=6)
            assert result.parameters_left < result.parameters
            assert [g.units for g in result.algorithm.prior.groups] == [5]
    frozen = nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.ReLU(), nn.Linear(6, 3))
    for options in ({"lambda_0": 0.01}, {"density": 1.0}):
        result = fp.run(fp.fedsparse(lr=0.1, **options), frozen, CLIENTS, rounds=1)
        assert torch.allclose(result.eta.mean["0.weight"], frozen[0].weight, atol=1e-6)


def test_a_sublist_of_clients_keeps_its_states() -> None:
    from stateful import Counting

    clients = [replace(c, index=10 + c.index) for c in CLIENTS]
    algorithm = fp.Algorithm(priors.Gaussian(), Counting(inference.Point(1e-9)))
    moved = [fp.run(algorithm, MODEL, population, rounds=4).params["1.bias"] for population in (CLIENTS, clients)]
    assert torch.allclose(*moved, atol=1e-7)


def test_states_in_memory_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One version a client, however many rounds."""
    from fedprior.store import MemoryStore
    from stateful import Counting

    stores = []

    class Watched(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            stores.append(self)

    monkeypatch.setitem(fp.run.__globals__, "MemoryStore", Watched)
    fp.run(**arguments(algorithm=fp.Algorithm(priors.Gaussian(), Counting(inference.Point(0.1))), rounds=5))
    assert [len(versions) for versions in stores[-1]._states.values()] == [1, 1, 1]
