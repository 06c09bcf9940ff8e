"""Personal parameters: they never travel, they live in the client's state, and clients end with models of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, close, equal, pooled, redraw, without_seconds
from fedprior import Client, Params, inference, posteriors, priors, tree, wire
from fedprior.codecs import Dense, Sparse, schema_of
from fedprior.codecs.frame import HEADER_BYTES
from fedprior.engines import Sequential, Workers
from fedprior.objective import Objective, params_of
from fedprior.rng import generator

CLIENTS = classification_clients((14, 9, 22, 17, 11))
TEST = pooled(classification_clients((30,), seed=1))


def net() -> nn.Module:
    """No bias before the batch norm: it has no gradient but rounding, and would not move."""
    layers = [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)]
    return redraw(nn.Sequential(*layers).double()).float()


MODEL = net()
HEAD = ("3.weight", "3.bias")
NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
SPLIT = [
    (fp.fedper(0.1), HEAD),
    (fp.fedrep(0.1), HEAD),
    (fp.fedbn(0.1), NORM),
    (fp.decoupled(0.1), HEAD),
    (fp.local(0.1), tuple(params_of(MODEL))),
]
split = pytest.mark.parametrize(("algorithm", "own"), SPLIT, ids=lambda v: getattr(v, "name", ""))
ALL = [
    *(algorithm for algorithm, _ in SPLIT),
    fp.pfedme(0.1),
    fp.ditto(0.1),
    fp.pfedbred(0.1),
    fp.fedppd(0.1),
    fp.pfedvem(0.1),
    fp.fedpop(0.1, epochs=4, burn_in=2),
]
WIRED = [
    replace(fp.fedper(0.1), codec=Sparse("int8", "zlib"), downlink=Dense(), delta=True, name="fedper-int8"),
    replace(fp.topk(0.1, 0.2), prior=SPLIT[0][0].prior, name="fedper-topk"),
    replace(ALL[-1], codec=Sparse("int8", "zlib"), downlink=Dense(), delta=True, name="fedpop-int8"),
    replace(ALL[-1], server=fp.server.Adam(0.05), codec=Dense("bfloat16"), name="fedpop-adam"),
    replace(fp.fedrep(0.1), server=fp.server.Adam(0.05), codec=Dense("bfloat16"), name="fedrep-adam"),
]


def run(algorithm: fp.Algorithm, rounds: int = 4, **fields) -> fp.Result:
    return fp.run(algorithm, MODEL, CLIENTS, rounds=rounds, cohort=3, test=TEST, **fields)


def kept(result: fp.Result, client: Client) -> Params | None:
    return wire.part(result.store.load(client.index), "kept")


@split
def test_personal_names_never_travel(algorithm: fp.Algorithm, own: tuple[str, ...]) -> None:
    """Not in eta, not in the message; the payload is as long as the shared parameters, both ways."""
    result = run(algorithm)
    eta = result.eta
    up = wire.flat(result.algorithm.message(eta, result.algorithm.inference.start(result.algorithm.prior, eta)))
    shared = {name: value for name, value in params_of(MODEL).items() if name not in own}
    for message in (tree.flatten(eta), up):
        assert [key.split("/", 1)[1] for key in message] == list(shared)
    for record in (c for r in result.history for c in r.clients):
        assert record.bytes_up == record.bytes_down == HEADER_BYTES + 4 * tree.size(shared)


@split
def test_each_client_keeps_its_own(algorithm: fp.Algorithm, own: tuple[str, ...]) -> None:
    """After a round those who took part have states with the personal names, which differ; the others have none."""
    result = run(algorithm, rounds=1)
    took_part = [c.index for c in result.history[0].clients]
    states = {c.index: kept(result, c) for c in CLIENTS}
    assert {i for i, s in states.items() if s is not None} == set(took_part) and len(took_part) == 3
    first, second, third = (states[i] for i in took_part)
    for a, b in ((first, second), (second, third)):
        assert a is not None and b is not None and set(a) == set(b) == set(own)
        assert not any(torch.equal(a[name], b[name]) for name in own)
    assert all(torch.equal(result.params[name], params_of(MODEL)[name]) for name in own)


def test_a_client_goes_on_with_what_it_kept() -> None:
    """Two rounds of FedPer by hand: decode, start from (eta, own), train, keep, average."""
    algorithm, objective = fp.fedper(0.1), Objective(MODEL)
    shared = {k: v for k, v in params_of(MODEL).items() if k not in HEAD}
    own = {c.index: {k: params_of(MODEL)[k] for k in HEAD} for c in CLIENTS}
    point = inference.Point(0.1)
    for number in (1, 2):
        trained = {}
        for c in CLIENTS:
            rng = generator(0, number, c.index, "e_step")
            trained[c.index] = point.train(
                objective, priors.Gaussian(), priors.Gaussian.Eta({**shared, **own[c.index]}), c, rng
            )
            own[c.index] = {k: trained[c.index][k] for k in HEAD}
        examples = sum(len(c.train) for c in CLIENTS)
        shared = {k: sum(len(c.train) * trained[c.index][k] for c in CLIENTS) / examples for k in shared}
    result = fp.run(algorithm, MODEL, CLIENTS, rounds=2)
    assert close({k: result.params[k] for k in shared}, shared, 1e-6)
    for c in CLIENTS:
        assert close(kept(result, c) or {}, own[c.index], 1e-6)


def test_local_training_is_one_long_run() -> None:
    """Without federation, a client's model after 3 rounds is 3 E-steps in a row, whoever else takes part."""
    result = fp.run(fp.local(0.1), MODEL, CLIENTS, rounds=3)
    for c in CLIENTS:
        phi = params_of(MODEL)
        for number in (1, 2, 3):
            rng = generator(0, number, c.index, "e_step")
            start = priors.Gaussian.Eta(phi)
            phi = inference.Point(0.1).train(Objective(MODEL), priors.Gaussian(), start, c, rng)
        assert equal(kept(result, c) or {}, phi)


def test_fedrep_trains_one_part_at_a_time() -> None:
    """The head's phase leaves the body's parameters alone, and the other way round; buffers move in both."""
    algorithm = fp.fedrep(0.1).bind(MODEL, CLIENTS[0].train.x)
    eta = algorithm.prior.init(params_of(MODEL))
    e_step: inference.Alternating = algorithm.inference  # type: ignore[assignment]
    before, objective = algorithm.prior.point(eta), Objective(MODEL)
    rng = generator(0, "phases")
    q, _ = e_step.e_step(objective, algorithm.prior, eta, CLIENTS[0], None, rng)
    again = generator(0, "phases")
    head = e_step.own.train(objective, algorithm.prior, eta, CLIENTS[0], again, before, HEAD)
    trained = set(objective.trainable)
    assert {k for k in trained if not torch.equal(head[k], before[k])} == set(HEAD)
    body = e_step.shared.train(objective, algorithm.prior, eta, CLIENTS[0], again, head, trained - set(HEAD))
    assert {k for k in trained if not torch.equal(body[k], head[k])} == trained - set(HEAD)
    assert equal(q.phi, body)


@pytest.mark.parametrize("algorithm", [*ALL, *WIRED], ids=lambda a: a.name)
def test_a_resumed_run_has_the_same_bits(algorithm: fp.Algorithm, tmp_path) -> None:
    """Stopped after round 2, gone on to 4: eta, records and personal models as if never stopped."""
    whole = run(algorithm, out=tmp_path / "whole", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(algorithm, out=tmp_path / "cut", checkpoint_every=2, on_round=stop_in_round_3)
    resumed = run(algorithm, out=tmp_path / "cut", checkpoint_every=2, resume=True)
    assert equal(tree.flatten(whole.eta), tree.flatten(resumed.eta))
    assert without_seconds(whole.history) == without_seconds(resumed.history)
    for c in CLIENTS:
        a, b = (r.store.load(c.index) for r in (whole, resumed))
        assert (a is None and b is None) or equal(a or {}, b or {})
        assert equal(whole.personal(c).models[0], resumed.personal(c).models[0])
    assert whole.personalised(CLIENTS) == resumed.personalised(CLIENTS)


def stop_in_round_3(record: fp.Round) -> None:
    if record.number == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("algorithm", [*ALL, *WIRED], ids=lambda a: a.name)
def test_engines_agree(algorithm: fp.Algorithm) -> None:
    one, other = run(algorithm, engine=Sequential(1)), run(algorithm, engine=Workers(2))
    assert equal(tree.flatten(one.eta), tree.flatten(other.eta))
    assert without_seconds(one.history) == without_seconds(other.history)
    assert one.personalised(CLIENTS) == other.personalised(CLIENTS)


def test_rows_before_and_after() -> None:
    """Seen clients start from their own head and unseen ones from the model's; `after` is one more E-step."""
    held = [
        replace(c, held_out=d.train) for c, d in zip(CLIENTS, classification_clients((5,) * 5, seed=0), strict=True)
    ]
    result = fp.run(fp.fedper(0.1), MODEL, held, rounds=1, cohort=2)
    seen = {c.index for c in result.history[0].clients}
    rows, objective = result.personalised(held), Objective(MODEL)
    assert [row["seen"] for row in rows] == ["yes" if c.index in seen else "no" for c in held]
    for c, row in zip(held, rows, strict=True):
        before = result.params | (kept(result, c) or {})
        after = inference.Point(0.1).train(
            objective, priors.Gaussian(), priors.Gaussian.Eta(before), c, generator(0, c.index, "personal")
        )
        for name, phi in (("before", before), ("after", after)):
            means = fp.metrics.evaluate(objective, phi, c.held_out).means()
            assert {k: row[f"{name}_{k}"] for k in means} == pytest.approx(means)
        assert row["on"] == "held_out" and row["examples"] == 5
    spread = fp.metrics.over_clients(rows)
    column = [float(row["after_accuracy"]) for row in rows]
    assert spread["after_accuracy"]["mean"] == pytest.approx(sum(column) / 5)
    assert min(column) <= spread["after_accuracy"]["worst_decile"] <= sorted(column)[1]
    nats = sorted(float(row["after_nats"]) for row in rows)
    assert nats[-2] <= spread["after_nats"]["worst_decile"] <= nats[-1]


def test_what_does_not_fit_is_refused_before_round_one() -> None:
    plain = fp.models.mlp(4, (3,), 3)
    with pytest.raises(ValueError, match="'@norm' names no layer"):
        fp.run(fp.fedbn(0.1), plain, CLIENTS, rounds=1)
    with pytest.raises(ValueError, match=r"no parameter is left for 'fc\.\*'"):
        fp.run(fp.fedper(0.1, "fc.*"), plain, CLIENTS, rounds=1)
    with pytest.raises(ValueError, match="unknown pattern '@body'"):
        fp.run(fp.fedper(0.1, "@body"), plain, CLIENTS, rounds=1)
    with pytest.raises(TypeError, match="Alternating needs a prior with personal parameters"):
        fp.run(replace(fp.fedrep(0.1), prior=priors.Gaussian()), plain, CLIENTS, rounds=1)
    with pytest.raises(TypeError, match=r"Dropout needs a whole model \(cut, sample, accept\)"):
        fp.run(fp.Algorithm(priors.Split({"*": priors.Dropout()}), inference.Point(0.1)), plain, CLIENTS, rounds=1)
    for prior, read in {priors.Sites(): "precision", priors.Distilled(): "student", priors.Scaffold(): "step"}.items():
        with pytest.raises(TypeError, match=rf"{type(prior).__name__} reads '{read}' of a posterior"):
            priors.Split({"@head": prior, "*": priors.Gaussian()}).bind(plain, CLIENTS[0].train.x)
    with pytest.raises(ValueError, match=r"no pattern matches '2\.weight'"):
        priors.Split({"1.*": priors.Gaussian()}).init({"2.weight": torch.zeros(1)})


def test_the_first_pattern_wins() -> None:
    prior = priors.Split({"1.*": priors.Personal(), "@head": priors.Gaussian(2.0), "*": priors.Gaussian()})
    names = prior.bind(MODEL, CLIENTS[0].train.x).names
    assert names == ((*NORM,), HEAD, ("0.weight",))


def test_a_penalty_is_a_factor_of_the_prior() -> None:
    """A flat prior times exp(-15 |phi - w|^2) has the E-step of N(w, 1/30): the penalty is in nats per data set."""
    w = params_of(MODEL)

    def pull(objective: Objective, phi: Params) -> torch.Tensor:
        return 15 * tree.total(tree.map(lambda a, b: (a - b) ** 2, phi, w))

    eta, client = priors.Gaussian.Eta(w), CLIENTS[0]
    phi = [
        point.e_step(Objective(MODEL), prior, eta, client, None, generator(0, "penalty"))[0].phi
        for point, prior in (
            (inference.Point(0.1, 10, penalty=pull), priors.Gaussian()),
            (inference.Point(0.1, 10), priors.Gaussian(30.0)),
            (inference.Point(0.1, 10), priors.Gaussian()),
        )
    ]
    assert close(phi[0], phi[1], 1e-5) and not close(phi[0], phi[2], 1e-3)
    assert schema_of(phi[0]) == schema_of(w)


def test_the_default_of_personal_is_fine_tuning() -> None:
    """FedAvg has no `personal`: one E-step from eta, the posterior's mean."""
    result = run(fp.fedavg(0.1))
    client = CLIENTS[0]
    q, _ = inference.Point(0.1).e_step(
        Objective(MODEL), priors.Gaussian(), result.eta, client, None, generator(0, client.index, "personal")
    )
    predictive = result.personal(client)
    assert isinstance(predictive, posteriors.Predictive) and predictive.weights == (1.0,)
    assert equal(predictive.models[0], q.phi)
