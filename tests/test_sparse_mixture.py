"""Clusters with masks of their own: planted inputs, FedSparse and IFCA as limits, and bytes of one model upwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import classification_clients, close, equal, pooled
from fedprior import Client, Examples, inference, posteriors, priors, server, tree, wire
from fedprior.codecs import PayloadError, Sparse, schema_of
from fedprior.codecs.frame import HEADER_BYTES
from fedprior.core import Stats
from fedprior.objective import Objective
from fedprior.priors.parts import part_etas
from fedprior.privacy import SecureSum
from fedprior.rng import generator
from laws import caught

INPUTS, RELEVANT = 6, 3


def net() -> nn.Module:
    """Hidden unit i reads input i: the first layer is 10 I, and moves little as inputs are a tenth."""
    first, last = nn.Linear(INPUTS, INPUTS, bias=False), nn.Linear(INPUTS, 2, bias=False)
    signs = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        first.weight.copy_(10 * torch.eye(INPUTS))
        last.weight.copy_(0.3 * signs[:, None] * signs.repeat(RELEVANT))
    return nn.Sequential(first, nn.Tanh(), last)


def planted(count: int = 8, size: int = 60) -> list[Client]:
    """Labels of even clients depend on the first three inputs, those of odd ones on the others."""
    rng, made = generator(0, "relevant"), []
    for index in range(count):
        x = torch.randn(size, INPUTS, generator=rng)
        own = x[:, RELEVANT:] if index % 2 else x[:, :RELEVANT]
        y = (own @ torch.tensor([1.5, -1.5, 1.0]) > 0).long()
        made.append(Client(index, f"client-{index}", Examples(x / 10, y)))
    return made


PLANTED = planted()
GATES = priors.SharedGates(0.5, start=1.0, hold=10, steps=5)
CLIENTS = classification_clients((14, 9, 22, 17, 11, 8))
MODEL = fp.models.mlp(4, (12,), 3, seed=0)


def sparse(prior: priors.SparseMixture, lr: float = 0.3, **fields: Any) -> fp.Algorithm:
    e_step = inference.Mixture(inference.Gains(lr, 1, 10), hard=True)
    return fp.Algorithm(prior, e_step, codec=Sparse(), name="sparse", **fields)


def masks(result: fp.Result) -> list[list[int]]:
    """The units that each component keeps."""
    return [part.keep["0"].nonzero().flatten().tolist() for part in part_etas(result.eta)]


def test_two_clusters_with_different_relevant_inputs_get_different_masks() -> None:
    """Each keeps the units that read its own inputs; one sparse model for all cannot, and is worse for everybody."""
    one, two = (
        fp.run(sparse(priors.SparseMixture(k, GATES, spread=0.3, seed=3)), net(), PLANTED, rounds=20) for k in (1, 2)
    )
    assert sorted(masks(two)) == [[0, 1, 2], [3, 4, 5]] and len(masks(one)[0]) == 3
    chosen = [masks(two)[int(choice(two, client))] for client in PLANTED]
    assert chosen == [[3, 4, 5] if client.index % 2 else [0, 1, 2] for client in PLANTED]
    hits = [fp.metrics.over_clients(r.personalised(PLANTED))["after_accuracy"]["mean"] for r in (one, two)]
    assert hits[1] > 0.9 and hits[1] > hits[0] + 0.1


def choice(result: fp.Result, client: Client) -> int:
    """The component that a client predicts with: the one that its own model has the units of."""
    (own,) = result.personal(client).models
    (k,) = [
        k for k, model in enumerate(points(result)) if all(((own[n] == 0) == (v == 0)).all() for n, v in model.items())
    ]
    return k


def points(result: fp.Result) -> list[fp.Params]:
    prior: Any = result.algorithm.prior
    return prior.points(result.eta)


def test_one_component_is_fedsparse() -> None:
    """The same bits, masks and prices, without the server's momentum."""
    gates = priors.SharedGates(0.4, start=0.9, hold=1, steps=3)
    made = sparse(priors.SparseMixture(1, gates, spread=0.0), weighting="examples")
    plain = replace(fp.fedsparse(0.3, density=0.4, momentum=0.0, batch_size=10), prior=gates)
    a, b = (fp.run(algorithm, MODEL, CLIENTS, rounds=6, cohort=4) for algorithm in (made, plain))
    assert equal(tree.flatten(part_etas(a.eta)[0]), tree.flatten(b.eta))
    assert a.parameters_left == b.parameters_left < 0.5 * a.parameters


def test_layers_may_be_called_as_components_are() -> None:
    """The same bits, momentum included, whatever their names are."""
    names = {"0": "part1_mean", "1": "part0_keep", "2": "part0_gain"}
    fields = {"rounds": 8, "engine": fp.engines.Sequential(1)}
    algorithm = sparse(priors.SparseMixture(2, replace(GATES, hold=2), spread=0.3, seed=3), server=server.Adam(0.1))
    plain, named = (
        fp.run(algorithm, model, PLANTED, **fields)
        for model in (net(), nn.Sequential(OrderedDict((names[k], v) for k, v in net().named_children())))
    )
    assert masks(plain)[0] != masks(plain)[1] and plain.parameters_left < plain.parameters
    for mine, other in zip(tree.flatten(plain.eta).values(), tree.flatten(named.eta).values(), strict=True):
        assert torch.equal(mine, other)


def test_at_a_density_of_one_it_is_ifca() -> None:
    gates = priors.SharedGates(1.0, start=1.0)
    made = sparse(priors.SparseMixture(2, gates, seed=1), 0.1, weighting="examples")
    plain = fp.ifca(0.1, start=1, batch_size=10)
    a, b = (fp.run(algorithm, MODEL, CLIENTS, rounds=4) for algorithm in (made, plain))
    for mine, other in zip(points(a), points(b), strict=True):
        assert close(mine, other, 1e-5)
    assert torch.allclose(a.eta.share["pi"], b.eta.share["pi"], rtol=1e-6)
    assert 0 < float(a.eta.share["pi"].min()) < 0.5


def test_a_client_sends_its_own_model_and_the_masks_of_empty_slots() -> None:
    """Bytes up: header, one sparse model with its gains, pi, and for the other slot what zeros cost."""
    result = fp.run(sparse(priors.SparseMixture(2, GATES, spread=0.3, seed=3)), net(), PLANTED, rounds=20)
    algorithm, eta, client = result.algorithm, result.eta, PLANTED[0]
    q, _ = algorithm.inference.e_step(Objective(net()), algorithm.prior, eta, client, None, generator(0, "e_step"))
    message, k = wire.flat(algorithm.message(eta, q)), int(q.pi["pi"].argmax())
    own, other, pi = (
        {n: v for n, v in message.items() if n.startswith(p)} for p in (f"part{k}_", f"part{1 - k}_", "pi")
    )
    assert not any(v.any() for v in other.values()) and all(v.any() for n, v in own.items() if "phi" in n)
    body = [len(Sparse().encode(part, 1.0)) - HEADER_BYTES for part in (own, other, pi)]
    assert len(Sparse().encode(message, 1.0)) == HEADER_BYTES + sum(body)
    empty = sum(sum((n + 7) // 8 for n in v.shape[:2]) + 1 for v in other.values())
    assert body[1] == empty < 0.2 * body[0]
    up, down = result.history[-1].bytes_up, result.history[-1].bytes_down
    assert up < 0.75 * down  # all components go down


def test_a_component_that_nobody_chose_keeps_its_weights_and_shrinks_on_time() -> None:
    case = priors.SparseMixture(2, priors.SharedGates(0.5, start=1.0, hold=0, steps=1)).bind(MODEL, CLIENTS[0].train.x)
    eta = case.init(Objective(MODEL).params())

    def both(eta: Any, pi: list[float]) -> Stats:
        rising = [tree.map(lambda z: 2 + z.cumsum(0), tree.map(torch.ones_like, p.gain)) for p in part_etas(eta)]
        parts = tuple(map(posteriors.Gains, (p.mean for p in part_etas(eta)), rising))
        return case.stats(posteriors.Mixed(parts, {"pi": torch.tensor(pi)}))

    first = both(eta, [0.5, 0.5])
    eta = case.project(case.m_step(eta._replace(part1_round={"t": torch.tensor(-1.0)}), first), eta)
    assert [int(part.keep["1"].sum()) for part in part_etas(eta)][1] == 12
    new = case.project(case.m_step(eta, both(eta, [1.0, 0.0])), eta)
    before, after = part_etas(eta)[1], part_etas(new)[1]
    assert float(after.round["t"]) == float(before.round["t"]) + 1
    assert int(after.keep["1"].sum()) < 12 and bool((after.keep["1"] <= before.keep["1"]).all())
    assert torch.equal(after.mean["1.weight"], before.mean["1.weight"][after.keep["1"] > 0])
    idle = part_etas(case.idle(eta))
    assert [float(part.round["t"]) for part in idle] == [float(part.round["t"]) + 1 for part in part_etas(eta)]
    assert int(idle[1].keep["1"].sum()) < 12


def test_differences_are_zero_for_all_components_but_the_client_s() -> None:
    algorithm = fp.fedsparsemixture(0.1, 0.5, value_type="int8").bind(MODEL, CLIENTS[0].train.x)
    prior: Any = algorithm.prior
    prior = prior.scheduled(5)
    algorithm = replace(algorithm, prior=prior)
    eta = prior.init(Objective(MODEL).params())
    e_step = algorithm.inference
    q, _ = e_step.e_step(Objective(MODEL), prior, eta, CLIENTS[0], None, generator(0, "e_step"))
    sent = algorithm.message(eta, q)
    moved, known = wire.difference(algorithm, eta, sent)
    k = int(q.pi["pi"].argmax())
    assert {n.split("/")[0] for n in known} == {"part0_phi", "part1_phi"}
    for name, value in moved.items():
        part, weight = name.split("_")[0], name.split("/")[1]
        if "phi" in name:
            want = q.parts[k].phi[weight] - part_etas(eta)[k].mean[weight] if part == f"part{k}" else 0 * value
            assert torch.allclose(value, want, atol=1e-6)
    heavy = sent.weighted(7.0)
    assert close(
        wire.flat(wire.restored(algorithm, eta, wire.unflat(wire.difference(algorithm, eta, heavy)[0], 7.0))),
        wire.flat(heavy),
        1e-5,
    )


def test_a_secure_sum_has_the_units_of_all_components() -> None:
    """Those that the component with most clients has removed as well: the run in the open, up to rounding."""
    clients, model = classification_clients((14, 9, 22, 17, 11)), fp.models.mlp(4, (8,), 3)
    plain = fp.fedsparsemixture(density=0.5)
    etas = [
        tree.flatten(fp.run(a, model, clients, rounds=2, progress=False).eta)
        for a in (plain, replace(plain, secure=SecureSum(most=22)))
    ]
    assert not torch.equal(etas[0]["part0_keep/1"], etas[0]["part1_keep/1"])
    assert close(*etas, 1e-3)


def test_messages_of_eight_bits_are_shorter() -> None:
    clients = classification_clients((60,) * 4)
    plain, coarse = (
        fp.run(fp.fedsparsemixture(0.1, 0.5, value_type=kind), MODEL, clients, rounds=4, test=pooled(clients))
        for kind in ("float32", "int8")
    )
    assert coarse.bytes_up < 0.75 * plain.bytes_up and coarse.accuracy > plain.accuracy - 0.05


def test_it_runs_resumes_and_exports(tmp_path: Path) -> None:
    """Two rounds and then the rest: the bits of a whole run; the model that is left is the common component's."""
    algorithm = sparse(priors.SparseMixture(2, GATES, spread=0.3, seed=3))
    whole = fp.run(algorithm, net(), PLANTED, rounds=16)
    fp.run(algorithm, net(), PLANTED, rounds=15, out=tmp_path)
    again = fp.run(algorithm, net(), PLANTED, rounds=16, out=tmp_path, resume=True)
    assert equal(tree.flatten(whole.eta), tree.flatten(again.eta))
    most = int(whole.eta.share["pi"].argmax())
    x = torch.cat([c.train.x for c in PLANTED])
    small = whole.model()
    assert sum(p.numel() for p in small.parameters()) == whole.parameters_left == 3 * (INPUTS + 2)
    assert torch.allclose(small(x), Objective(net()).outputs(points(whole)[most], x), atol=1e-5)
    with pytest.raises(ValueError, match="algorithm was"):
        other = sparse(priors.SparseMixture(2, GATES, spread=0.2, seed=3))
        fp.run(other, net(), PLANTED, rounds=17, out=tmp_path, resume=True)


def test_what_does_not_fit_is_refused() -> None:
    for prior in (priors.Gaussian(), priors.SharedGates(None)):
        with pytest.raises(
            ValueError, match=r"SparseMixture needs a prior SharedGates\(density=\.\.\.\) with a density"
        ):
            priors.SparseMixture(2, prior)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SharedGates needs a whole model \(cut, .*SparseMixture takes SharedGates"):
        priors.Mixture(2, GATES)
    with pytest.raises(TypeError, match="SparseMixture needs responsibilities, and Point has none"):
        fp.run(replace(fp.fedsparsemixture(density=0.5), inference=inference.Point(0.1)), MODEL, CLIENTS, rounds=2)
    with pytest.raises(ValueError, match="cannot be reached"):
        fp.run(fp.fedsparsemixture(density=0.01), MODEL, CLIENTS, rounds=2)
    case = priors.SparseMixture(2, GATES).bind(MODEL, CLIENTS[0].train.x)
    eta = case.init(Objective(MODEL).params())
    q = tuple(posteriors.Gains(part.mean, tree.map(torch.ones_like, part.keep)) for part in part_etas(eta))
    fine = case.stats(posteriors.Mixed(q, {"pi": torch.tensor([0.0, 1.0])}))
    assert case.accept(eta, fine) is fine
    with pytest.raises(PayloadError, match="gains are nats between 0"):
        case.accept(eta, Stats({**fine.terms, "part1_gain": tree.map(torch.neg, fine["part1_gain"])}))
    assert schema_of(wire.flat(fine)).keys() >= {"part0_phi/1.weight", "part1_gain/1", "pi/pi"}


MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any], Callable[[], None]]] = {
    "gains of both clusters in each": (
        priors.SparseMixture,
        "m_step",
        lambda f: lambda s, eta, t: together(f(s, eta, t)),
        test_two_clusters_with_different_relevant_inputs_get_different_masks,
    ),
    "every slot is filled": (
        priors.SparseMixture,
        "stats",
        lambda f: lambda s, q: f(s, replace(q, pi={"pi": torch.full_like(q.pi["pi"], 0.5)})),
        test_a_client_sends_its_own_model_and_the_masks_of_empty_slots,
    ),
    "a component nobody chose waits": (
        priors.SharedGates,
        "unseen",
        lambda f: lambda s, eta: eta,
        test_a_component_that_nobody_chose_keeps_its_weights_and_shrinks_on_time,
    ),
    "a reference without pi": (
        priors.SparseMixture,
        "reference",
        lambda f: lambda s, eta, sent: f(s, eta, replace(sent, terms={**sent.terms, "pi": {"pi": torch.ones(2)}})),
        test_differences_are_zero_for_all_components_but_the_client_s,
    ),
}


def together(eta: Any) -> Any:
    """Both components with the mean of their gains."""
    parts = part_etas(eta)
    gain = tree.map(lambda *own: torch.stack(own).mean(0), *(part.gain for part in parts))
    return eta._replace(**{f"part{k}_gain": gain for k in range(len(parts))})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tests_catch_the_mistake(mistake: str) -> None:
    caught(*MISTAKES[mistake])
