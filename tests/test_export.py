"""An exported file computes what the slim module computes, and a file that does not is never left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fedprior as fp
from cases import classification_clients, equal, pooled, redraw
from cli_calls import SMALL, call, refused
from fedprior import config, finished, models, tree
from fedprior.objective import Objective
from fedprior.result import Result
from fedprior.rng import generator

exporting = sys.modules["fedprior.export"]
MODELS = {
    "lenet": (lambda: models.lenet((6, 8), 20, image=16), (1, 16, 16)),
    "mlp": (lambda: models.mlp(12, (7, 6), 3), (12,)),
    "softmax": (lambda: models.softmax(12, 3), (12,)),
    "char_gru": (lambda: models.char_gru(20, 4, 8), (5,)),
    "resnet, batch norm": (lambda: models.resnet(8, "batch", width=4), (1, 8, 8)),
    "resnet, group norm": (lambda: models.resnet(8, "group", width=4), (1, 8, 8)),
    "vit": (lambda: models.vit(image=8, patch=4, width=12, heads=3, depth=1, hidden=20), (1, 8, 8)),
    "char_transformer": (lambda: models.char_transformer(20, 5, 12, 3, 4, 1, 10, every=True), (5,)),
}
NOTHING_TO_CUT = ("softmax", "char_gru")
QUICK = {("lenet", "pt2"), ("mlp", "pt2"), ("char_gru", "pt2"), ("lenet", "onnx"), ("mlp", "onnx")}
TABLE = [
    pytest.param(name, kind, marks=() if kind == "safetensors" or (name, kind) in QUICK else pytest.mark.slow)
    for name in MODELS
    for kind in exporting.FORMATS
]


def setting(name: str) -> Result:
    """Weights and gates at random: each group has lost a unit, and has one left."""
    make, shape = MODELS[name]
    model, rng = redraw(make()), generator(2, name)
    inputs = torch.randn(64, *shape, generator=rng)
    if name.startswith("char"):
        inputs = torch.randint(20, (64, *shape), generator=rng)
    objective = Objective(model)
    params = {k: v + 0.1 * torch.arange(len(v)) if "running" in k else v for k, v in objective.params().items()}
    algorithm = fp.fedavg() if name in NOTHING_TO_CUT else fp.fedsparse(lambda_0=0.01).bind(model, inputs[:1])
    eta, _ = algorithm.start(params)
    for keep in getattr(eta, "keep", {}).values():
        keep[torch.rand(keep.shape, generator=rng) < 0.5] = 0.0
        keep[0], keep[-1] = 0.9, 0.0
    return Result(algorithm, objective, eta, [], inputs)


def outputs(path: Path, name: str, x: Tensor) -> Tensor:
    """What the file computes, by the loaders that its users call."""
    if path.suffix == ".safetensors":
        return fp.load_slim(path, MODELS[name][0]())(x)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    return torch.from_numpy(onnxruntime.InferenceSession(path).run(["outputs"], {"x": x.numpy()})[0])


@pytest.mark.parametrize(("name", "kind"), TABLE)
def test_a_file_computes_what_the_model_computes(name: str, kind: str, tmp_path: Path) -> None:
    """In batches of any size: the same as the slim module, and as the whole model with its removed units closed."""
    result, path = setting(name), tmp_path / "below" / f"a.{kind}"
    done = fp.export(result, path)
    assert list(path.parent.iterdir()) == [path]
    slim, whole = (model.requires_grad_(False) for model in (result.model(), result.objective.module(result.params)))
    for batch in (1, 2, 7, 64):
        x = result.inputs[-batch:]
        got = outputs(path, name, x)
        for want in (slim(x), whole(x)):
            assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert done.parameters == result.parameters_left == sum(p.numel() for p in slim.parameters())
    assert (done.parameters < result.parameters) == (name not in NOTHING_TO_CUT)
    assert done.path == path and done.size_bytes == path.stat().st_size and done.difference <= 1e-5
    data = path.read_bytes()
    assert b"site-packages" not in data and str(Path(__file__).parent.parent).encode() not in data
    assert result.inputs[0].numpy().tobytes() not in data and result.inputs[:2].numpy().tobytes() not in data
    if kind == "pt2":
        with zipfile.ZipFile(path) as archive:
            assert not any(archive.read(entry).startswith((b"PK", b"\x80")) for entry in archive.namelist())


def tampered(data: bytes, result: Result) -> bytes:
    """The same file with the largest weight of the last layer doubled."""
    weight = list(result.model().parameters())[-2].detach().clone()
    before = weight.numpy().tobytes()
    weight.view(-1)[weight.abs().argmax()] *= 2
    assert data.count(before) == 1
    return data.replace(before, weight.numpy().tobytes())


@pytest.mark.parametrize("kind", exporting.FORMATS)
def test_a_tampered_file_is_found_out(kind: str, tmp_path: Path) -> None:
    result, path = setting("mlp"), tmp_path / f"a.{kind}"
    difference = fp.export(result, path).difference
    assert exporting.check(result, path) == difference
    path.write_bytes(tampered(path.read_bytes(), result))
    with pytest.raises(ValueError, match="the file's outputs differ from the model's by"):
        exporting.check(result, path)


def test_a_file_that_fails_its_check_is_not_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, path = setting("mlp"), tmp_path / "a.safetensors"
    kind = exporting.FORMATS["safetensors"]

    def wrong(*arguments) -> bytes:
        return tampered(kind.encode(*arguments), result)

    monkeypatch.setattr(exporting, "FORMATS", {"safetensors": replace(kind, encode=wrong)})
    with pytest.raises(ValueError, match="the file's outputs differ"):
        fp.export(result, path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"an older file")
    with pytest.raises(ValueError, match="the file's outputs differ"):
        fp.export(result, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"an older file"]


def test_outputs_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    result = setting("softmax")
    result.eta.mean["1.bias"][0] = torch.nan
    with pytest.raises(ValueError, match="differ from the model's by nan"):
        fp.export(result, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_load_slim_gives_the_module_back(name: str, tmp_path: Path) -> None:
    """To the bit, buffers and attributes with it, from a dense model with other weights; metadata say what is left."""
    result, path = setting(name), tmp_path / "a.safetensors"
    fp.export(result, path, about={"model": "mine", "note": "x"})
    dense = redraw(MODELS[name][0](), seed=7)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    got, want = fp.load_slim(path, dense), result.model()
    assert equal(dict(got.state_dict()), dict(want.state_dict())) and str(got) == str(want)
    assert not got.training and equal(dict(dense.state_dict()), before)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "mine" and metadata["note"] == "x" and metadata["algorithm"] == str(result.algorithm)
    left = {g: keep.nonzero().flatten().tolist() for g, keep in getattr(result.eta, "keep", {}).items()}
    assert json.loads(metadata["kept"]) == left


OTHERS = {
    "layers": (lambda: models.mlp(12, (7,), 3), "only one of the two has"),
    "a narrower layer": (lambda: models.mlp(12, (7, 6), 2), r"5\.weight is \(3, \d\) .* in the file and \(2, 6\)"),
    "another type": (lambda: models.mlp(12, (7, 6), 3).double(), "float32 in the file and .*float64 in the model"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_architecture_is_refused(other: str, tmp_path: Path) -> None:
    fp.export(setting("mlp"), tmp_path / "a.safetensors")
    make, text = OTHERS[other]
    with pytest.raises(ValueError, match=text):
        fp.load_slim(tmp_path / "a.safetensors", make())


def test_files_that_are_not_whole_and_layers_that_cannot_shrink(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fp.export(setting("char_gru"), path)
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        fp.load_slim(path, models.char_gru(20, 5, 8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fp.load_slim(path, models.char_gru(20, 4, 8))


class Branching(nn.Module):
    """Takes another way for other data: it has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if float(x.sum()) > 0 else -x)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, x


def test_what_cannot_be_exported_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clients = classification_clients([8, 8])
    result = fp.run(fp.fedavg(), Branching(), clients, rounds=1)
    assert torch.equal(result.inputs, clients[0].train.x)
    with pytest.raises(ValueError, match=r"PyTorch cannot export this Branching as a program .*'safetensors' needs"):
        fp.export(result, tmp_path / "a.pt2")
    assert fp.export(result, tmp_path / "a.safetensors").parameters == 15
    with pytest.raises(TypeError, match="one tensor as output"):
        fp.export(replace(result, objective=Objective(Pair(4, 3))), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="unknown format 'onx', did you mean 'onnx'"):
        fp.export(result, tmp_path / "b.onx")
    with pytest.raises(ValueError, match=r"ends like a onnx file, and format is 'pt2'"):
        fp.export(result, tmp_path / "b.onnx", "pt2")
    assert fp.export(result, tmp_path / "b.bin", "safetensors").difference == 0
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'fedprior\[exp"):
        fp.export(result, tmp_path / "b.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.bin"]


SPARSE = """
run = { rounds = 2, cohort = 2 }
data = { name = "digits", clients = 5 }
algorithm = { name = "fedsparse", SIZE }
"""
SIZES = {"fedsparse": "lambda_0 = 1.0, gate_lr = 1.0", "sized": "density = 0.3", "budget": "budget_mb = 0.02"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compared")
    call("compare", "digits", "--algorithms", "fedavg", *SMALL, "--out", place / "out")
    for name, size in SIZES.items():
        (place / f"{name}.toml").write_text(SPARSE.replace("SIZE", size))
        call("run", place / f"{name}.toml", "--quiet", "--out", place / "out" / name)
    return place / "out"


@pytest.mark.parametrize("name", ["fedavg", *SIZES])
def test_a_finished_run_is_exported_from_its_folder(compared: Path, name: str, tmp_path: Path) -> None:
    folder = compared / name
    row = json.loads((folder / "results.json").read_text())[0]
    result, written = finished.load(folder)
    assert {key: result.row()[key] for key in row} == row and len(result.inputs) == 64
    assert (row["parameters_left"] < row["parameters"]) == (name != "fedavg")
    line = call("export", folder).stdout
    path = folder / "slim.safetensors"
    for part in (path, f"{row['parameters_left']:,} parameters", f"{path.stat().st_size:,} bytes", "at most 0.0e+00"):
        assert str(part) in line
    dense = config.read(folder / "run.toml").make_model()
    assert torch.equal(fp.load_slim(path, dense)(result.inputs), result.model()(result.inputs))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for section in ("algorithm", "model"):
        assert json.loads(metadata[section]) == json.loads(json.dumps(written.sections()[section]))
    call("export", folder, "--out", tmp_path / "a.pt2")
    call("export", folder, "--format", "pt2", "--out", tmp_path / "b")
    for path in (tmp_path / "a.pt2", tmp_path / "b"):
        assert exporting.check(result, path, "pt2") <= 1e-5


def test_folders_that_cannot_be_exported(compared: Path, tmp_path: Path) -> None:
    text = refused("export", compared)
    assert "comparison" in text and all(str(compared / name) in text for name in ("fedavg", "fedsparse"))
    assert "holds no run" in refused("export", tmp_path)
    assert "unknown format 'onx', did you mean 'onnx'" in refused("export", compared / "fedavg", "--format", "onx")
    clients = classification_clients([8, 8])
    arguments = {"algorithm": fp.fedavg(), "model": models.mlp(4, (3,), 3), "clients": clients, "rounds": 2}
    result = fp.run(**arguments, test=pooled(clients), out=tmp_path / "library")
    text = refused("export", tmp_path / "library")
    assert "run.toml" in text and "resume=True" in text and "fedprior.export(result, FILE)" in text
    again = fp.run(**arguments, test=pooled(clients), out=tmp_path / "library", resume=True)
    assert equal(tree.flatten(again.eta), tree.flatten(result.eta)) and torch.equal(again.inputs, result.inputs)
    fp.export(again, tmp_path / "library.safetensors")


CHANGED = [
    ("rounds = 2", "rounds = 3", "has 2 of 3 rounds; to finish it: fedprior run"),
    *[("hidden = [64]", f"hidden = {new}", "is not of the model and algorithm in") for new in ([65], [9], [64, 8])],
]


@pytest.mark.parametrize(("old", "new", "text"), CHANGED)
@pytest.mark.parametrize("name", ["fedavg", "sized"])
def test_a_run_not_of_its_toml(compared: Path, name: str, old: str, new: str, text: str, tmp_path: Path) -> None:
    for path in (compared / name).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    toml = tmp_path / "run.toml"
    assert old in toml.read_text()
    toml.write_text(toml.read_text().replace(old, new))
    assert text in refused("export", tmp_path)


@pytest.mark.slow
def test_the_benchmark_writes_every_cell(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "inference.py"
    subprocess.run([sys.executable, script, "--seconds", "1", "--json", tmp_path / "a.json"], check=True)
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert {(c["engine"], c["batch"]) for c in numbers["cells"]} == {
        (e, b) for e in ("eager", "onnxruntime") for b in (1, 64)
    }
    assert all(c["ratio"] == c["dense_us"] / c["slim_us"] > 1 for c in numbers["cells"])
    assert numbers["parameters_left"] < 0.05 * numbers["parameters"]
