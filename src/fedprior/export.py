"""The slim network of a finished run as one file, which is loaded and tried before it gets its name.

    format        file                                                   to load it                     tolerance
    safetensors   parameters and buffers, no code; metadata as below     load_slim(path, dense model)   1e-5
    pt2           torch.export's program                                 torch.export.load              1e-5
    onnx          ONNX graph, input "x", output "outputs"                onnxruntime          [export]  1e-4

    difference = max |file(x) - model(x)| / max |model(x)|      over batches of 1, 3 and 64 real inputs x

Programs take batches of any size. None of the files holds a pickle, an input or a path of this machine. Metadata of
a safetensors file: "algorithm" and "model", and "kept", JSON: the numbers of the units left, by group.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from fedprior.objective import Objective
from fedprior.records import write_atomically
from fedprior.result import Result
from fedprior.slim import SIZED, resized
from fedprior.values import known_name

BATCHES = (1, 3, 64)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        parameters: of the network in it; buffers do not count.
        size_bytes: of the file.
        difference: the largest that was seen, relative to the largest output.
    """

    path: Path
    parameters: int
    size_bytes: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.parameters:,} parameters, {self.size_bytes:,} bytes; loaded again, "
            f"its outputs on real inputs differ by at most {self.difference:.1e} of the largest"
        )


def export(
    result: Result, path: str | Path, format: str | None = None, about: Mapping[str, str] | None = None
) -> Exported:
    """Write `result.model()` to a file, load the file, and compare its outputs with the model's on real inputs.

    Args:
        result: a finished run's.
        path: the file; one that is there already is replaced, once the new one has passed.
        format: "safetensors", "pt2" or "onnx"; None goes by the ending of `path`.
        about: further metadata of a safetensors file, or other texts for "algorithm" and "model".

    Raises:
        ValueError: for an unknown format, a model that PyTorch cannot export, or outputs that differ; there is no
            new file then.
        ModuleNotFoundError: if onnx, onnxscript or onnxruntime is not installed.
    """
    path = Path(path)
    kind = _kind(path, format)
    model = result.model().cpu().requires_grad_(False)
    metadata = {"algorithm": str(result.algorithm), "model": type(model).__name__, **(about or {})}
    metadata["kept"] = json.dumps(result.kept)
    data = kind.encode(model, result.inputs, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.with_name(f".{path.name}.trial")
    try:
        write_atomically(trial, data)
        difference = _compare(result, trial, kind)
        trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)
    return Exported(path, sum(p.numel() for p in model.parameters()), len(data), difference)


def check(result: Result, path: str | Path, format: str | None = None) -> float:
    """The difference (see above) between an exported file and `result.model()`; a ValueError if it is too large."""
    return _compare(result, Path(path), _kind(Path(path), format))


def _compare(result: Result, path: Path, kind: Format) -> float:
    model, loaded = result.model().cpu(), kind.load(path, Objective(result.objective.model, device="cpu").model)
    differences = []
    with torch.no_grad():
        for batch in BATCHES:
            x = result.inputs[torch.arange(batch) % len(result.inputs)]
            want, got = model(x), loaded(x)
            if not isinstance(want, Tensor):
                raise TypeError(f"only a model with one tensor as output is exported, got {type(want).__name__}")
            if got.shape != want.shape:
                raise ValueError(f"the file's outputs are {tuple(got.shape)} and the model's {tuple(want.shape)}")
            smallest = torch.finfo(want.dtype).tiny
            differences.append((got - want).abs().max() / want.abs().max().clamp(min=smallest))
    worst = float(torch.stack(differences).max())  # nan if there is one: no comparison accepts it
    if not worst <= kind.tolerance:
        raise ValueError(
            f"the file's outputs differ from the model's by {worst:.1e} of the largest, and {kind.tolerance:.0e} is "
            "allowed"
        )
    return worst


def load_slim(path: str | Path, model: nn.Module) -> nn.Module:
    """The slim module in a safetensors file, in evaluation mode.

    Args:
        path: as `export` wrote it.
        model: the dense architecture, with any weights; it is copied.

    Raises:
        ValueError: if the file is damaged, or not of this architecture.
    """
    try:
        tensors = safetensors.load(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    own = _tensors(model)
    if own.keys() != tensors.keys():
        names = ", ".join(sorted(own.keys() ^ tensors.keys()))
        raise ValueError(f"{path} is not of this {type(model).__name__}: only one of the two has {names}")
    for name, value in own.items():
        _check_fits(path, name, tensors[name], value, model.get_submodule(name.rpartition(".")[0]))
    smaller = {k: v.to(own[k].device) for k, v in tensors.items() if v.shape != own[k].shape}
    return Objective(resized(model, smaller)).module(tensors)


def _check_fits(path: str | Path, name: str, value: Tensor, own: Tensor, layer: nn.Module) -> None:
    smaller = value.ndim == own.ndim and all(a <= b for a, b in zip(value.shape, own.shape, strict=True))
    fits = value.shape == own.shape or (smaller and isinstance(layer, SIZED))
    if not fits or value.dtype != own.dtype:
        sides = (f"{tuple(t.shape)} {t.dtype}" for t in (value, own))
        raise ValueError(f"{path} is not of this model: {name} is {' in the file and '.join(sides)} in the model")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def _safetensors(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    return safetensors.save({k: v.clone().contiguous() for k, v in _tensors(model).items()}, dict(metadata))


def _pt2(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with _exporter(model):
        torch.export.save(_program(model, inputs), buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, inputs: Tensor, metadata: Mapping[str, str]) -> bytes:
    names = {"input_names": ["x"], "output_names": ["outputs"], "dynamic_shapes": ({0: "batch"},)}
    with _exporter(model):
        written: Any = torch.onnx.export(_program(model, inputs), dynamo=True, verbose=False, **names)
        return written.model_proto.SerializeToString()


def _program(model: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    """The model as a graph, traced with zeros: a file holds no one's data."""
    zeros = inputs.new_zeros(2, *inputs.shape[1:])
    program = torch.export.export(model, (zeros,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.example_inputs = None  # they would be stored as a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders
    return program


_TALKS = ("torch.onnx", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def _exporter(model: nn.Module) -> Iterator[None]:
    """Without the exporters' remarks on their own code and on ours; whatever they object to is a ValueError."""
    logs = {log: log.level for log in map(logging.getLogger, _TALKS)}
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # they have dozens of kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "Constraints violated (batch)" in reason:
            reason = "its forward fixes the number of examples, as len(x) does: write x.flatten(1), or x.shape[0]"
        raise ValueError(
            f"PyTorch cannot export this {type(model).__name__} as a program ({reason}); 'safetensors' needs no program"
        ) from error
    finally:
        for log, level in logs.items():
            log.setLevel(level)


def _load_pt2(path: Path, dense: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _load_onnx(path: Path, dense: nn.Module) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@dataclass(frozen=True)
class Format:
    """One kind of file: how it is made and loaded, and how much its outputs may differ."""

    encode: Callable[[nn.Module, Tensor, Mapping[str, str]], bytes]
    load: Callable[[Path, nn.Module], Callable[[Tensor], Tensor]]
    tolerance: float
    packages: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "safetensors": Format(_safetensors, load_slim, 1e-5),
    "pt2": Format(_pt2, _load_pt2, 1e-5),
    "onnx": Format(_onnx, _load_onnx, 1e-4, ("onnx", "onnxscript", "onnxruntime")),
}


def _kind(path: Path, format: str | None) -> Format:
    ending = path.suffix[1:]
    known_name("format", ending if format is None else format, FORMATS)
    if format is not None and ending != format and ending in FORMATS:
        raise ValueError(f"{path} ends like a {ending} file, and format is {format!r}")
    kind = FORMATS[format or ending]
    if missing := [name for name in kind.packages if find_spec(name) is None]:
        raise ModuleNotFoundError(f"{format or ending} needs {', '.join(missing)}: pip install 'fedprior[export]'")
    return kind
