"""A GPU gives what the CPU gives, up to rounding: the table of algorithms, engines, a resumed run, sums of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import close, equal, image_clients, redraw, without_seconds
from fedprior import engines, tree
from fedprior.engines.ranks import Ranks
from fedprior.rng import generator
from rank_calls import free_port
from test_engines import CASES, STACKED, Case, wanted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DRAWS = {"dropout-layers", "fedbn"}  # layers that draw, from the GPU's own generator
ROUNDED = {"int8-zlib", "feedback-int8", "slim-conv-int8"}  # another last bit can become another step of a value


@pytest.fixture(autouse=True)
def exact() -> Any:
    """Convolutions in float32, not TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def cpu(values: fp.Params) -> fp.Params:
    assert all(v.is_cuda for v in values.values())
    return {k: v.cpu() for k, v in values.items()}


def check(got: fp.Result, position: int, tolerance: float) -> None:
    """Equal rows of records but for what rounding moves, and etas within the tolerance."""
    want = wanted(position)
    for a, b in zip(without_seconds(got.history), without_seconds(want.history), strict=True):
        assert [(c.index, c.status) for c in a.clients] == [(c.index, c.status) for c in b.clients]
        assert a.parameters_left == b.parameters_left
    assert close(cpu(tree.flatten(got.eta)), tree.flatten(want.eta), tolerance)


@pytest.mark.parametrize("engine", [engines.Sequential, engines.Auto], ids=["sequential", "auto"])
@pytest.mark.parametrize("position", range(len(CASES)), ids=[c.name for c in CASES])
def test_a_gpu_agrees_with_the_cpu(position: int, engine: Any) -> None:
    case = CASES[position]
    got = case.run(engine(), device="cuda")
    if case.name not in DRAWS:
        check(got, position, 0.3 if case.name in ROUNDED else 1e-3)
    metrics = [m.metrics for m in got.history if m.metrics]
    assert metrics and all(v == v for row in metrics for v in row.values())


@pytest.mark.parametrize("name", sorted(STACKED))
def test_stacked_clients_on_a_gpu(name: str) -> None:
    position = next(i for i, c in enumerate(CASES) if c.name == name)
    check(CASES[position].run(engines.Stacked(3), device="cuda"), position, 1e-3)


def small_gru() -> nn.Module:
    return redraw(fp.models.char_gru(7, 4, 6))


def letters() -> list[fp.Client]:
    rng = generator(0, "letters")
    return [
        fp.Client(
            i, f"c{i}", fp.Examples(torch.randint(7, (n, 5), generator=rng), torch.randint(7, (n,), generator=rng))
        )
        for i, n in enumerate((6, 5, 23, 9))
    ]


NETWORKS = {
    "convolutions": Case("lenet", fp.fedavg(0.1), lambda: redraw(fp.models.lenet((2, 3), 4, 4, 16)), image_clients(6)),
    "residual": Case("resnet", fp.fedavg(0.1), lambda: redraw(fp.models.resnet(8, width=4)), image_clients(6)),
    "recurrent": Case("gru", fp.fedavg(0.1), small_gru, letters()),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine", [engines.Sequential, engines.Auto])
def test_networks_that_have_other_kernels_on_a_gpu(network: str, engine: Any) -> None:
    case = NETWORKS[network]
    got, want = case.run(engine(), device="cuda"), case.run(engines.Sequential(1))
    assert close(cpu(tree.flatten(got.eta)), tree.flatten(want.eta), 1e-3)


@pytest.mark.parametrize("name", ["fedadam", "personal-states", "slim"])
def test_a_resumed_run_on_a_gpu_has_the_same_bits(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    whole = case.run(engines.Sequential(), device="cuda")

    def stop(record: fp.Round) -> None:
        if record.number == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        case.run(engines.Sequential(), device="cuda", out=tmp_path, checkpoint_every=2, on_round=stop)
    again = case.run(engines.Sequential(), device="cuda", out=tmp_path, checkpoint_every=2, resume=True)
    assert equal(cpu(tree.flatten(again.eta)), cpu(tree.flatten(whole.eta)))


def test_the_sum_over_ranks_goes_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank, which is all that one GPU can have."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    ranks = Ranks.join(60.0)
    try:
        values = torch.arange(5.0, dtype=torch.float64, device="cuda")
        ranks.add(values)
        assert equal({"values": values.cpu()}, {"values": torch.arange(5.0, dtype=torch.float64)})
    finally:
        ranks.leave()


def test_workers_are_refused_on_a_gpu() -> None:
    assert not engines.Workers.usable("cuda")
