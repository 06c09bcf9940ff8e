"""A run as a TOML file: flat sections, every key with a default, and nothing that is not understood.

    [run]           RunConfig: rounds, cohort, seed, ...
    [data]          DataConfig: the examples and how they are dealt out to clients
    [model]         name, and the arguments of a function of MODELS
    [algorithm]     name, and the arguments of a constructor of fedprior.ALGORITHMS
    [availability]  the fields of fedprior.Availability

and, for what stands between the uploads and their sum, none of which is there unless it is written:

    [secure]        the fields of fedprior.privacy.SecureSum; may be empty
    [privacy]       the fields of fedprior.privacy.Privacy
    [robust]        name, and the arguments of a rule of RULES

TOML has no null: the string "none" stands for it. Relative paths are those of the TOML file's folder.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedprior import data, models, robust
from fedprior.algorithm import Algorithm
from fedprior.algorithms import ALGORITHMS
from fedprior.cohort import Availability
from fedprior.engines import ENGINES
from fedprior.privacy import Privacy, SecureSum
from fedprior.values import arguments, known_name, toml

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (
        models.lenet,
        models.mlp,
        models.softmax,
        models.char_gru,
        models.char_transformer,
        models.resnet,
        models.vit,
        models.rules,
        models.elsa,
    )
}
AUTOENCODERS = ("elsa",)  # of MODELS: their targets are the inputs
RULES: Mapping[str, Callable[..., robust.Rule]] = {
    "median": robust.Median,
    "trimmed_mean": robust.TrimmedMean,
    "krum": robust.Krum,
    "norm_bound": robust.NormBound,
    "norm_clip": robust.NormClip,
    "centred_clip": robust.CentredClip,
}
TABLES = ("csv", "parquet")
PARTITIONS = ("dirichlet", "iid", "shards", "by_key")
_SECTIONS = ("run", "data", "model", "algorithm", "availability", "secure", "privacy", "robust")
_OF_THE_RUN = ("cohort", "population")  # fields of Privacy that [run] and [data] say
_AUTO = {"fashion-mnist": "lenet", "shakespeare": "char_gru"}
_SMALL: Mapping[tuple[str, str], Mapping[str, Any]] = {("digits", "mlp"): {"hidden": (64,)}}


@dataclass(frozen=True)
class RunConfig:
    """The arguments of fedprior.run that are plain values, and those of its engine.

    Attributes:
        engine: a name of fedprior.engines.ENGINES.
        threads: of "sequential": PyTorch's while clients train; None leaves them as they are.
        timeout_seconds: of "torchrun": how long the ranks wait for each other.
    """

    rounds: int = 100
    cohort: int = 10
    seed: int = 0
    evaluate_every: int = 1
    checkpoint_every: int = 1
    device: str = "cpu"
    engine: str = "auto"
    threads: int | None = 1
    timeout_seconds: int = 1800

    def __post_init__(self) -> None:
        known_name("engine", self.engine, ENGINES)
        for name in ("rounds", "cohort", "evaluate_every", "checkpoint_every", "threads", "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.threads is not None and self.threads > 1024:
            raise ValueError(f"threads must be at most 1024, got {self.threads}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True)
class DataConfig:
    """The examples and their clients.

    Attributes:
        name: of fedprior.data, or "csv" or "parquet" for a file of the user's own.
        folder: where a named set's files are; None looks in the usual places.
        path: of the user's file.
        target: its column to predict.
        client: its column that says whose a row is, for by_key.
        test_fraction: of the user's rows, drawn at random, for the central evaluation.
        partition: one of PARTITIONS; "auto" is by_key for examples that have owners, else dirichlet.
        clients: how many; by_key has as many as there are owners.
        alpha: of dirichlet.
        shards_per_client: of shards.
        holdout: the fraction of each client's examples that is held out.
    """

    name: str = "fashion-mnist"
    folder: str | None = None
    path: str | None = None
    target: str | None = None
    client: str | None = None
    test_fraction: float = 0.2
    partition: str = "auto"
    clients: int = 100
    alpha: float = 1.0
    shards_per_client: int = 2
    holdout: float = 0.0

    def __post_init__(self) -> None:
        known = [source.name for source in data.available()]
        known_name("data set", self.name, [*known, *TABLES])
        known_name("partition", self.partition, ["auto", *PARTITIONS])
        if self.name in TABLES and (self.path is None or self.target is None):
            raise ValueError(
                f'the data set "{self.name}" needs the file and the column to predict: '
                "--target COLUMN, or path and target in [data]"
            )
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be in [0, 1), got {self.test_fraction}")
        if self.clients < 1:
            raise ValueError(f"clients must be at least 1, got {self.clients}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")


@dataclass(frozen=True)
class Call:
    """The name of a function in a table, and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A run. The model may be "auto" until `resolve` has seen the examples; all else is complete."""

    run: RunConfig
    data: DataConfig
    model: Call
    algorithm: Call
    availability: Availability
    secure: SecureSum | None = None
    privacy: Privacy | None = None
    robust: Call | None = None

    def sections(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, in the order of the file."""
        layers: dict[str, dict[str, Any]] = {}
        if self.secure is not None:
            layers["secure"] = asdict(self.secure)
        if self.privacy is not None:
            fields = {k: v for k, v in vars(self.privacy).items() if k not in _OF_THE_RUN}
            layers["privacy"] = {**fields, "units": dict(self.privacy.units)}
        if self.robust is not None:
            layers["robust"] = {"name": self.robust.name, **self.robust.arguments}
        return {
            "run": asdict(self.run),
            "data": asdict(self.data),
            "model": {"name": self.model.name, **self.model.arguments},
            "algorithm": {"name": self.algorithm.name, **self.algorithm.arguments},
            "availability": asdict(self.availability),
            **layers,
        }

    def make_algorithm(self) -> Algorithm:
        """What [algorithm], [secure], [privacy] and [robust] describe."""
        rule = None if self.robust is None else RULES[self.robust.name](**self.robust.arguments)
        made = ALGORITHMS[self.algorithm.name](**self.algorithm.arguments)
        return replace(made, secure=self.secure, privacy=self.privacy, robust=rule)

    def make_model(self) -> nn.Module:
        """What a resolved [model] describes."""
        return MODELS[self.model.name](**self.model.arguments)


def read(path: Path) -> Config:
    """The configuration in a TOML file; a ValueError names the file and the line or key."""
    try:
        return parse(tomllib.loads(path.read_text(encoding="utf-8")), path.absolute().parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(sections: Mapping[str, Any], base: Path) -> Config:
    """A Config from the sections of a TOML file in the folder `base`; missing keys get their defaults."""
    for name, section in sections.items():
        known_name("section", name, _SECTIONS)
        if not isinstance(section, Mapping):
            raise ValueError(f"{name!r} must be a section, [{name}], got {section!r}")
    run, source, model, algorithm, availability = (dict(sections.get(name, {})) for name in _SECTIONS[:5])
    for key in ("folder", "path"):
        if isinstance(source.get(key), str) and source[key] != "none":
            source[key] = str(base / Path(source[key]).expanduser())
    config = Config(
        RunConfig(**arguments(RunConfig, run, "run")),
        DataConfig(**arguments(DataConfig, source, "data")),
        _model(model),
        _algorithm(algorithm),
        Availability(**arguments(Availability, availability, "availability")),
        **_layers(sections),
    )
    config.make_algorithm()
    return config


def changed(config: Config, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """With other values for some keys; another rule in [robust] has arguments of its own."""
    before = config.sections()
    if "robust" in sections and sections["robust"].get("name") != before.get("robust", {}).get("name"):
        before.pop("robust", None)
    return parse(before | {name: before.get(name, {}) | dict(keys) for name, keys in sections.items()}, Path.cwd())


def _model(section: dict[str, Any]) -> Call:
    name = section.pop("name", "auto")
    known_name("model", name, ["auto", *MODELS])
    if name == "auto":
        return Call(name, section)
    checked = arguments(MODELS[name], section, "model")
    return Call(name, {key: checked[key] for key in section})


def _algorithm(section: dict[str, Any]) -> Call:
    name = section.pop("name", "fedavg")
    known_name("algorithm", name, ALGORITHMS)
    return Call(name, arguments(ALGORITHMS[name], section, "algorithm"))


def _layers(sections: Mapping[str, Any]) -> dict[str, Any]:
    """What stands between the uploads and their sum, of the sections that are there."""
    found: dict[str, Any] = {}
    if "secure" in sections:
        found["secure"] = SecureSum(**arguments(SecureSum, sections["secure"], "secure"))
    if "privacy" in sections:
        found["privacy"] = Privacy(**arguments(Privacy, sections["privacy"], "privacy", _OF_THE_RUN))
    if "robust" in sections:
        section = dict(sections["robust"])
        known_name("name in [robust]", name := section.pop("name", "none"), RULES)
        rule = Call(name, arguments(RULES[name], section, "robust"))
        if name == "krum" and "attackers" not in rule.arguments:
            raise ValueError('the rule "krum" needs the most hostile clients of a cohort: write attackers in [robust]')
        found["robust"] = rule
    return found


def resolve(model: Call, dataset: str, x: Tensor, outputs: int, seed: int) -> Call:
    """The model with all its arguments: those given, else what the data say, else the function's defaults."""
    name = _AUTO.get(dataset, "mlp") if model.name == "auto" else model.name
    said = {"inputs": x[0].numel(), "image": x.shape[-1], "window": x.shape[-1], "seed": seed}
    said |= {"classes": outputs, "vocabulary": outputs}
    wanted = inspect.signature(MODELS[name]).parameters
    said = {k: v for k, v in said.items() if k in wanted}
    given = {**said, **_SMALL.get((dataset, name), {}), **model.arguments}
    return Call(name, arguments(MODELS[name], given, "model"))


def to_toml(config: Config) -> str:
    """The inverse of `parse`."""
    lines = ["# again, with the same bits:  fedprior run THIS_FILE --out OTHER_FOLDER"]
    for name, section in config.sections().items():
        lines += ["", f"[{name}]", *(f"{key} = {toml(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"
