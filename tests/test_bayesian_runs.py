"""The algorithms of algorithms/bayesian.py in whole runs: engines agree, runs resume, messages may be rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import fedprior as fp
from cases import classification_clients, close, equal, without_seconds
from fedprior import tree
from fedprior.codecs import Dense
from fedprior.engines import Sequential, Workers

MAKERS: dict[str, Callable[[], fp.Algorithm]] = {
    "scaffold": lambda: fp.scaffold(0.1),
    "feddyn": lambda: fp.feddyn(0.1),
    "fola": lambda: fp.fola(0.1),
    "fedhb": lambda: fp.fedhb(0.1, clients=5),
    "learnedscale": lambda: fp.learnedscale(0.1),
    "laplace": lambda: fp.laplace(0.02),
    "horseshoe": lambda: fp.horseshoe(0.02),
    "fedpa": lambda: fp.fedpa(0.1, epochs=3),
    "pvi": lambda: fp.pvi(0.1, 10.0),
    "fedep": lambda: fp.fedep(0.1, 10.0),
    "fedsep": lambda: fp.fedsep(0.1, 5, 10.0),
}
ALL = pytest.mark.parametrize("name", MAKERS)
CLIENTS = classification_clients((12, 7, 9, 15, 10))
ROUNDED = ["scaffold", "feddyn", "fedhb", "learnedscale", "fedpa"]


def run(algorithm: fp.Algorithm, rounds: int = 4, **more) -> fp.Result:
    more = {"engine": Sequential(threads=1)} | more
    return fp.run(algorithm, fp.models.mlp(4, (5,), 3), CLIENTS, rounds=rounds, cohort=3, **more)


def test_the_table_has_them_all() -> None:
    from fedprior.algorithms import bayesian

    made = {n for n, f in vars(bayesian).items() if getattr(f, "__module__", "") == bayesian.__name__}
    assert made == MAKERS.keys() <= fp.ALGORITHMS.keys()


@ALL
def test_engines_agree(name: str) -> None:
    """Processes and the loop: the same bits and the same bytes, personal states included."""
    runs = [run(MAKERS[name](), engine=engine) for engine in (Sequential(threads=1), Workers(2))]
    assert equal(*(tree.flatten(r.eta) for r in runs))
    assert without_seconds(runs[0].history) == without_seconds(runs[1].history)
    assert not any(r.kept_eta for r in runs[0].history)
    assert all(v.isfinite().all() for v in runs[0].params.values())


@ALL
def test_a_resumed_run_is_the_whole_run(name: str, tmp_path: Path) -> None:
    run(MAKERS[name](), rounds=2, out=tmp_path)
    assert equal(*(tree.flatten(r.eta) for r in (run(MAKERS[name](), out=tmp_path, resume=True), run(MAKERS[name]()))))


@pytest.mark.parametrize("name", ROUNDED)
def test_messages_of_eight_bits(name: str) -> None:
    """Upwards, as differences: the weights are those of the plain run within a few steps of an 8-bit grid."""
    plain, algorithm = run(MAKERS[name]()), MAKERS[name]()
    rounded = run(replace(algorithm, codec=Dense("int8"), downlink=Dense(), delta=True))
    assert not equal(plain.params, rounded.params) and close(plain.params, rounded.params, 0.1)
    assert rounded.bytes_up < 0.75 * plain.bytes_up
