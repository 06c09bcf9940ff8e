"""Secure sums, privacy and robust rules from the command line and from TOML, on tiny runs of the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli_calls import TINY, call, refused
from fedprior import config, finished, robust
from fedprior.privacy import Privacy, SecureSum
from fedprior.records import read

FIVE = TINY.replace("cohort = 2", "cohort = 5") + 'weighting = "uniform"\n'

SECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "secure": ("[secure]", {"secure": SecureSum()}),
    "bounds": (
        "[secure]\nbound = {phi = 2, gain = 1e4}\nbits = 64",
        {"secure": SecureSum(bound={"phi": 2.0, "gain": 1e4}, bits=64)},
    ),
    "privacy": ("[privacy]\ntarget_epsilon = 8\nclip = 0.5", {"privacy": Privacy(8.0, clip=0.5)}),
    "poisson": (
        '[privacy]\nnoise_multiplier = 1\nsampling = "poisson"\naccountant = "pld"\nunits = {gain = 10}',
        {"privacy": Privacy(None, 1.0, sampling="poisson", accountant="pld", units={"gain": 10.0})},
    ),
    "both": ("[secure]\n[privacy]\nnoise_multiplier = 0.5", {"secure": SecureSum(), "privacy": Privacy(None, 0.5)}),
    "median": ('[robust]\nname = "median"', {"robust": robust.Median()}),
    "krum": ('[robust]\nname = "krum"\nattackers = 1\nkeep = 2', {"robust": robust.Krum(1, 2)}),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_are_the_fields_of_an_algorithm(name: str, tmp_path: Path) -> None:
    text, fields = SECTIONS[name]
    path = tmp_path / "my.toml"
    path.write_text(FIVE + text)
    parsed = config.read(path)
    algorithm = parsed.make_algorithm()
    for field in ("secure", "privacy", "robust"):
        assert getattr(algorithm, field) == fields.get(field)
    path.write_text(config.to_toml(parsed))
    assert config.read(path) == parsed
    assert ("[secure]" in path.read_text()) == ("secure" in fields)


def test_every_rule_has_a_name() -> None:
    rules = {rule for rule in vars(robust).values() if isinstance(rule, type) and hasattr(rule, "combine")}
    assert set(config.RULES.values()) == rules - {robust.Rule, robust.Mean}


FLAGS: dict[str, tuple[list[str], str, set[str]]] = {
    "secure": (["--secure"], "[secure]", {"within"}),
    "privacy": (
        ["--noise-multiplier", "0.02", "--delta", "0.1", "--clip", "0.5"],
        "[privacy]\nnoise_multiplier = 0.02\ndelta = 0.1\nclip = 0.5",
        {"epsilon", "clip"},
    ),
    "robust": (["--robust", "trimmed_mean"], '[robust]\nname = "trimmed_mean"', set()),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_sections(name: str, tmp_path: Path) -> None:
    """The same bits, whether a flag says it or a file."""
    flags, section, shown = FLAGS[name]
    plain, whole = tmp_path / "plain.toml", tmp_path / "whole.toml"
    plain.write_text(FIVE.replace('weighting = "uniform"\n', ""))
    whole.write_text(FIVE + section)
    call("run", plain, "--weighting", "uniform", *flags, "--out", tmp_path / "flags", "--quiet")
    call("run", whole, "--out", tmp_path / "file", "--quiet")
    call("run", tmp_path / "flags" / "run.toml", "--out", tmp_path / "again", "--quiet")
    files = [tmp_path / folder / "model.safetensors" for folder in ("flags", "file", "again")]
    assert len({file.read_bytes() for file in files}) == 1
    call("run", plain, "--weighting", "uniform", "--out", tmp_path / "without", "--quiet")
    assert (tmp_path / "without" / "model.safetensors").read_bytes() != files[0].read_bytes()
    assert all(r.layer.keys() == shown for r in read(tmp_path / "flags" / "records.jsonl"))


def test_flags_change_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(FIVE + "[privacy]\ntarget_epsilon = 8\nclip = 0.5\nquantile = 0.5\ndelta = 0.01")
    private = config.changed(config.read(path), {"privacy": {"target_epsilon": 2.0}}).privacy
    assert private == Privacy(2.0, clip=0.5, quantile=0.5, delta=0.01)
    path.write_text(FIVE + '[robust]\nname = "krum"\nattackers = 1')
    before = config.read(path)
    assert config.changed(before, {"robust": {"name": "median"}}).make_algorithm().robust == robust.Median()
    assert config.changed(before, {"run": {"engine": "workers"}}).robust == before.robust


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "rule": ("", ["--robust", "medan"], "did you mean 'median'"),
    "no rule": ("[robust]", [], "unknown name in [robust] 'none'"),
    "krum": ("", ["--robust", "krum"], "write attackers in [robust]"),
    "share": ('[robust]\nname = "trimmed_mean"\nshare = 0.5', [], "0 <= share < 0.5, got 0.5"),
    "argument": ('[robust]\nname = "median"\nshare = 0.1', [], "unknown key in [robust] 'share'"),
    "both": ("[secure]", ["--robust", "median"], "leave robust out"),
    "weights": ("", ["--secure", "--weighting", "examples"], "write most=..., the largest number"),
    "private weights": ("", ["--target-epsilon", "8", "--weighting", "examples"], "weighting='uniform'"),
    "wish": ("[privacy]", [], "target_epsilon=..., noise_multiplier=..., or both"),
    "epsilon": ("", ["--target-epsilon", "0"], "target_epsilon > 0"),
    "of the run": ("[privacy]\ncohort = 5", [], "unknown key in [privacy] 'cohort'"),
    "accountant": ('[privacy]\nnoise_multiplier = 1\naccountant = "plt"', [], "must be 'rdp' or 'pld', got 'plt'"),
    "delta": ("", ["--target-epsilon", "8", "--delta", "0.2"], "well below 1 / 5"),
    "dear": ("", ["--target-epsilon", "0.1", "--noise-multiplier", "0.5", "--delta", "0.01"], "give more noise"),
    "bits": ("[secure]\nbits = 8", [], "bits must be one of 16, 32, 64, got 8"),
    "bound": ('[secure]\nbound = {phi = "a"}', [], "phi of bound in [secure] must be float, got 'a'"),
    "term": ("[secure]\nbound = {psi = 1}", [], "no bound for the term 'phi'"),
    "type": ('[secure]\nbound = "a"', [], "must be float or a table {name = value, ...} or \"none\", got 'a'"),
    "section": ("", ["--secure", "--engine", "stacked"], "Auto(), Workers() or Sequential()"),
    "poisson": ('[secure]\n[privacy]\nnoise_multiplier = 1\nsampling = "poisson"', [], "write sampling='fixed'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_line_before_there_is_a_folder(name: str, tmp_path: Path) -> None:
    text, flags, words = REFUSED[name]
    path = tmp_path / "my.toml"
    path.write_text(FIVE + text)
    assert words in refused("run", path, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_of_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(TINY + 'weighting = "uniform"\n')
    line = refused("run", tmp_path / "my.toml", "--secure", "--out", tmp_path / "out")
    assert "a cohort of 3 at least" in line and not (tmp_path / "out").exists()


def test_a_run_whose_privacy_is_spent_is_finished(tmp_path: Path) -> None:
    """Two of three rounds: the third would be more than the target."""
    private = Privacy(noise_multiplier=0.05, delta=0.01).planned(3, 5, 5)
    target = (private.epsilon(2) + private.epsilon(3)) / 2
    path, out = tmp_path / "my.toml", tmp_path / "out"
    path.write_text(FIVE + f"[privacy]\nnoise_multiplier = 0.05\ntarget_epsilon = {target}\ndelta = 0.01")
    call("run", path, "--out", out, "--quiet")
    assert len(read(out / "records.jsonl")) == 2
    result, _ = finished.load(out)
    assert result.algorithm.privacy is not None and result.algorithm.privacy.cohort == 5
    before = (out / "model.safetensors").read_bytes()
    call("run", path, "--resume", out, "--quiet")
    assert len(read(out / "records.jsonl")) == 2 and (out / "model.safetensors").read_bytes() == before


def test_a_run_goes_on_under_its_own_layer_alone(tmp_path: Path) -> None:
    path, out = tmp_path / "my.toml", tmp_path / "out"
    path.write_text(FIVE)
    call("run", path, "--noise-multiplier", "0.02", "--delta", "0.01", "--out", out, "--quiet")
    assert "[privacy] and are now [run], [data], [model], [algorithm], [availability]" in refused(
        "run", path, "--resume", out
    )
    flags = ["--noise-multiplier", "0.02", "--delta", "0.01", "--resume", out]
    assert "[availability], [privacy] and are now" in refused("run", path, "--secure", *flags)
    other = [*flags[:1], "0.03", *flags[2:]]
    assert "noise_multiplier in [privacy] was 0.02 and is now 0.03" in refused("run", path, *other)
    path.write_text(FIVE.replace("rounds = 3", "rounds = 4"))
    call("run", path, *flags, "--quiet")  # a noise that was given serves any number of rounds
    target = ["--target-epsilon", "1e4", "--delta", "0.01"]
    call("run", path, *target, "--out", tmp_path / "target", "--quiet")
    path.write_text(FIVE.replace("rounds = 3", "rounds = 5"))
    line = refused("run", path, *target, "--resume", tmp_path / "target")
    assert "its noise was found for 4 rounds, and rounds is 5" in line


def test_noise_that_drowns_the_signal_is_one_line_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(FIVE)
    flags = ["--delta", "0.01", "--quiet", "--out"]
    loud = call("run", path, "--noise-multiplier", "100", *flags, tmp_path / "loud").stderr
    assert loud.count("\n") == 1 and loud.startswith("fedprior: the noise of a round has ")
    assert call("run", path, "--noise-multiplier", "0.02", *flags, tmp_path / "low").stderr == ""


def test_a_private_run_tells_what_it_has_spent(tmp_path: Path) -> None:
    path, told = tmp_path / "my.toml", {}
    path.write_text(FIVE)
    for name, flags in {"noise": [], "target": ["--target-epsilon", "900"]}.items():
        flags = ["--noise-multiplier", "0.5", "--delta", "0.1", "--rounds", "2", *flags]
        shown = call("run", path, *flags, "--out", tmp_path / name).stdout
        (told[name],) = [line for line in shown.splitlines() if line.startswith("privacy")]
        rounds = read(tmp_path / name / "records.jsonl")
        assert len(rounds) in (1, 2) and f"privacy spent: epsilon {rounds[-1].layer['epsilon']:.3g}" in told[name]
    assert (
        " of 900, at delta 0.1" in told["target"] and ", at delta 0.1" in told["noise"] and " of " not in told["noise"]
    )
    call("run", path, "--rounds", "1", "--out", tmp_path / "plain", "--quiet")
    assert "privacy" not in call("run", path, "--rounds", "2", "--resume", tmp_path / "plain").stdout
    assert len(read(tmp_path / "plain" / "records.jsonl")) == 2
