"""Privacy and robust rules on a federation: the simulation's bits, and noise that nobody else can take off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedprior as fp
from cases import equal, hidden, lost_of, without_seconds
from fedprior import robust, tree, wire
from fedprior.codecs import schema_of
from fedprior.privacy import Privacy, SecureSum
from fedprior.privacy import secure as secure_protocol
from fedprior.privacy.accountant import ORDERS
from fedprior.privacy.parties import Simulated
from fedprior.rng import noise_generator

pytest.importorskip("flwr", reason="federations need flwr, in an environment of its own: make test-flower")

from flwr.app import Message  # pyright: ignore[reportMissingImports]

from fedprior.federation import bundle, secure_node, server
from fedprior_node import mail
from grid import MODEL
from spending import spent
from test_federation_secure import federated, losing, request_of, simulated
from test_federation_stages import Asked

pytestmark = pytest.mark.filterwarnings("ignore::fedprior.privacy.NoiseWarning")  # nine clients alone
PLAIN = fp.fedavg(0.1, weighting="uniform")
LOUD = Privacy(noise_multiplier=1.0, delta=0.01)
TWO_ROUNDS = replace(LOUD, target_epsilon=(spent(LOUD, 1.0, 2, 9, 9) + spent(LOUD, 1.0, 3, 9, 9)) / 2)
SUM = SecureSum()


def private(privacy: Privacy, secure: SecureSum | None = None, algorithm: fp.Algorithm = PLAIN) -> fp.Algorithm:
    return replace(algorithm, privacy=privacy, secure=secure)


RULES = [robust.Mean(), robust.NormBound(), robust.NormClip(), robust.CentredClip(), robust.Median()]
RULES += [robust.TrimmedMean(0.2), robust.Krum(2), robust.Krum(2, 5)]
GAINS = {"phi": 1.0, "gain": 100.0}
SPARSE = replace(fp.fedsparse(0.1, density=0.3), weighting="uniform")
LAYERS: dict[str, fp.Algorithm] = {
    **{str(rule): replace(PLAIN, robust=rule) for rule in RULES},
    "median of sparse": replace(SPARSE, robust=robust.Median()),
    "clipped alone": private(Privacy(noise_multiplier=0.0, delta=0.01, clip=0.01)),
    "central": private(LOUD),
    "central, adaptive": private(replace(LOUD, noise_multiplier=0.5, quantile=0.5, clip=0.05)),
    "central, poisson": private(replace(LOUD, sampling="poisson")),
    "central, momentum": private(LOUD, algorithm=replace(fp.fedadam(0.1), weighting="uniform")),
    "central, sparse": private(replace(LOUD, units=GAINS), algorithm=SPARSE),
    "distributed": private(LOUD, SUM),
    "distributed, adaptive": private(replace(LOUD, noise_multiplier=0.5, quantile=0.5, clip=0.05), SUM),
    "distributed, sparse": private(replace(LOUD, units=GAINS), SUM, SPARSE),
}


def epsilons(result: fp.Result) -> list[float]:
    return [r.layer["epsilon"] for r in result.history]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise from the run's seed, as in a simulation."""
    monkeypatch.setattr(server.secrets, "randbits", lambda bits: 0)
    monkeypatch.setattr(secure_node.Session, "noise", lambda self, index: Simulated(0, self.number, {}).noise(index))
    yield


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("cohort", [0, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_the_model_the_bytes_and_the_records_are_those_of_the_simulation(
    name: str, cohort: int, tmp_path: Path
) -> None:
    algorithm = LAYERS[name]
    got, want = federated(algorithm, tmp_path, cohort=cohort), simulated(algorithm, cohort=cohort or None)
    told = hidden(want.history) if algorithm.secure else without_seconds(want.history)
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == told
    assert not any(r.kept_eta for r in got.history)
    if algorithm.privacy and algorithm.privacy.noise_multiplier:
        privacy, z = algorithm.privacy, algorithm.privacy.noise_multiplier
        assert epsilons(got) == pytest.approx([spent(privacy, z, n, cohort or 9, 9, ORDERS) for n in (1, 2, 3)])


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["Median()", "central, adaptive", "distributed, adaptive"])
def test_a_node_that_is_lost_is_a_drop_out_of_the_simulation(name: str, tmp_path: Path) -> None:
    gone = (1, 4, 7)

    def silent(number: int, request: Message, reply: Message) -> Message | None:
        asked = request_of(request)
        return None if asked.get("number") == 2 and request.metadata.dst_node_id == 101 else reply

    lose = losing({"keys": gone}, [2]) if LAYERS[name].secure else silent
    got, want = federated(LAYERS[name], tmp_path, lose), simulated(LAYERS[name], {(2, i) for i in gone})
    assert lost_of(got) == {(2, i) for i in gone}
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))


@pytest.mark.parametrize("secure", [None, SUM], ids=["central", "distributed"])
def test_a_target_finds_the_noise_or_ends_the_run(secure: Any, tmp_path: Path) -> None:
    """Three rounds within 4 take a noise of which a hundredth less is too little; a given one ends the run in time."""
    got = federated(private(Privacy(4.0, delta=0.01), secure), tmp_path / "a")
    planned: Any = got.algorithm.privacy
    assert len(got.history) == 3 and got.history[-1].layer["epsilon"] <= 4.0
    assert planned.epsilon(3) == got.history[-1].layer["epsilon"]
    assert replace(planned, noise_multiplier=0.99 * planned.noise_multiplier).epsilon(3) > 4.0
    ended = federated(private(TWO_ROUNDS, secure), tmp_path / "b")
    assert [r.number for r in ended.history] == [1, 2]
    for result in (got, ended):
        z: Any = result.algorithm.privacy.noise_multiplier if result.algorithm.privacy else None
        assert epsilons(result) == pytest.approx([spent(LOUD, z, r.number, 9, 9, ORDERS) for r in result.history])
        assert not any(r.lost() for r in result.history)


@pytest.mark.parametrize("name", ["central, adaptive", "distributed"])
def test_a_resumed_federation_has_the_bits_of_one_that_was_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its noise is remembered by the server, and is another one in another run."""
    if LAYERS[name].secure:
        monkeypatch.setattr(secure_node.Session, "noise", lambda s, index: noise_generator(9, s.number, index))
    federated(LAYERS[name], tmp_path / "a", rounds=2)
    secret = tmp_path / "a" / "out" / server.SECRET
    (tmp_path / "b" / "out").mkdir(parents=True)
    if LAYERS[name].secure is None:
        assert secret.stat().st_mode & 0o777 == 0o600
        (tmp_path / "b" / "out" / server.SECRET).write_text(secret.read_text())
    got, want = federated(LAYERS[name], tmp_path / "a", resume=True), federated(LAYERS[name], tmp_path / "b")
    assert equal(tree.flatten(got.eta), tree.flatten(want.eta))
    assert without_seconds(got.history) == without_seconds(want.history)


@pytest.mark.parametrize("secure", [None, SUM], ids=["central", "distributed"])
def test_the_noise_does_not_follow_from_what_others_know(secure: Any, tmp_path: Path) -> None:
    """The run's seed is known to nodes and server: two runs of one seed differ by noise, and only by that."""
    runs = [federated(private(LOUD, secure), tmp_path / str(k), rounds=1) for k in range(2)]
    assert not equal(runs[0].params, runs[1].params)
    plain = [
        federated(private(replace(LOUD, noise_multiplier=0.0), secure), tmp_path / f"p{k}", rounds=1) for k in "ab"
    ]
    assert equal(plain[0].params, plain[1].params)


def noisy(ask: Asked, **fields: Any) -> list[bytes]:
    """The payloads of nine clients after a round up to its training."""
    reasons, payloads = ask("masked", ask.down(), *ask.shared(), **fields)
    assert not reasons
    return payloads


HEAD = {"population": 9, "noise": 1.0, "clip": 1.0}


def test_a_round_that_is_run_again_has_the_same_noise_and_another_task_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was revealed; else nobody has seen a sum, and the noise may be fresh."""
    drawn: list[list[int]] = []
    true = secure_node.Session.noise

    def noise(self: secure_node.Session, index: int) -> Any:
        drawn[-1] += true(self, index).integers(2**62, size=1).tolist()
        return true(self, index)

    monkeypatch.setattr(secure_node.Session, "noise", noise)
    ask = Asked(tmp_path, private(LOUD, SUM))
    ask.head |= HEAD
    for change in ({}, {}, {"seed": 1}, {"clip": 2.0}):
        drawn.append([])
        noisy(ask, **change)
        ask("reveal", secure_protocol.request(ask.ids, ask.ids))
    first, again, other, wider = drawn
    assert first == again and len(set(first)) == 9
    assert not set(first) & set(other) and not set(first) & set(wider) and not set(other) & set(wider)
    ask.head["number"] = 2
    drawn.append([])
    noisy(ask)
    assert not set(first) & set(drawn[-1])


def test_a_stage_is_not_answered_again_for_another_clip(tmp_path: Path) -> None:
    """Two vectors under one mask would tell their difference."""
    ask = Asked(tmp_path, private(LOUD, SUM))
    ask.head |= HEAD
    request = [ask.down(), *ask.shared()]
    assert not ask("masked", *request)[0]
    for change in ({"clip": 2.0}, {"seed": 1}, {"noise": 2.0}):
        assert "asked twice for masked" in ask("masked", *request, **change)[0][0]


def test_a_node_counts_for_itself_what_is_spent(tmp_path: Path) -> None:
    """A server that goes on after the target, or that names too little noise, gets no vectors."""
    ask = Asked(tmp_path, private(TWO_ROUNDS, SUM))
    ask.head |= HEAD | {"number": 3}
    reasons, payloads = ask("masked", ask.down(), *ask.shared())
    assert f"round 3 would exceed target_epsilon={TWO_ROUNDS.target_epsilon:g}" in reasons[0] and not payloads
    ask = Asked(tmp_path / "b", private(Privacy(4.0, delta=0.01), SUM))
    ask.head |= HEAD | {"noise": 0.1}
    reasons, payloads = ask("masked", ask.down(), *ask.shared())
    assert "would exceed" in reasons[0] and not payloads


def scaled(payload: bytes, factor: float) -> bytes:
    """The payload of a client that says `factor` times what it learned."""
    eta, _ = PLAIN.start({k: v.detach() for k, v in MODEL.named_parameters()})
    schema = schema_of(wire.flat(PLAIN.message(eta, PLAIN.inference.start(PLAIN.prior, eta))))
    message, clients = PLAIN.codec.decode(payload, schema)
    return PLAIN.codec.encode({k: factor * v for k, v in message.items()}, clients)


def test_a_lying_client_of_a_node_is_clipped_by_the_server_and_left_out_by_a_rule(tmp_path: Path) -> None:
    """Client 1 sends a thousand times what it learned; clipping is the server's, not the node's word."""

    def lying(number: int, request: Message, reply: Message) -> Message:
        header, parts = bundle.unpack(mail.blob(reply), 1 << 20)
        if request_of(request)["ask"] == "round" and request.metadata.dst_node_id == 101:
            parts[0] = scaled(parts[0], 1000.0)
        return mail.reply(request, bundle.pack(header, parts))

    start = {k: v.detach() for k, v in MODEL.named_parameters()}

    def moved(result: fp.Result) -> float:
        return float(sum((v - start[k]).square().sum() for k, v in result.params.items())) ** 0.5

    clips = federated(private(Privacy(noise_multiplier=0.0, delta=0.01, clip=0.1)), tmp_path / "a", lying, rounds=1)
    assert 0 < moved(clips) <= 0.1
    bound = federated(replace(PLAIN, robust=robust.NormBound()), tmp_path / "b", lying, rounds=1)
    assert [c.index for c in bound.history[0].lost()] == [1] and moved(bound) < 10
    assert moved(federated(PLAIN, tmp_path / "c", lying, rounds=1)) > 10
