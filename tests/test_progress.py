"""What a run says while it goes on, and of the layers of which it removes nothing."""

import sys

import pytest
import torch

import fedprior as fp
from cases import classification_clients
from coupled_nets import CharLSTM
from fedprior import cli, compare, config
from fedprior.progress import left_whole

CLIENTS = classification_clients((8, 9, 10))


def mlp():
    return fp.models.mlp(4, (6, 5), 3)  # layers 1, 3 and 5 have parameters


SPARSE = [
    fp.fedsparse(density=0.5),
    fp.fedsparse(lambda_0=0.1),
    fp.grouplasso(),
    fp.feddropout(),
    fp.fedsparsemixture(density=0.5),
]


@pytest.mark.parametrize("algorithm", SPARSE, ids=lambda a: a.name)
def test_a_run_with_groups_begins_with_the_layers_that_stay_whole(algorithm, capsys):
    """Of a perceptron, the last one: its units are the classes."""
    fp.run(algorithm, mlp(), CLIENTS, rounds=1, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert f"{algorithm.name}: layers that stay whole: 5 (Linear)" in [line.strip() for line in lines]
    fp.run(algorithm, mlp(), CLIENTS, rounds=1, progress=False)
    assert capsys.readouterr().err == ""


def test_a_run_without_groups_says_nothing_of_them(capsys):
    fp.run(fp.fedavg(), mlp(), CLIENTS, rounds=1, progress=True)
    assert "whole" not in capsys.readouterr().err


@pytest.mark.parametrize("terminal, show", [(True, None), (True, False), (False, None)])
def test_what_comes_before_and_after_the_rounds_is_told_on_a_terminal(terminal, show, tmp_path, capsys, monkeypatch):
    """Planning, and evaluating and adapting clients, may take a minute."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    wanted = config.parse({"run": {"rounds": 1, "cohort": 2}, "data": {"name": "digits", "clients": 2}}, tmp_path)
    compare.execute(compare.build(wanted), tmp_path / "out", progress=show)
    told = capsys.readouterr().err
    cli.export(tmp_path / "out")
    assert (f"writing {tmp_path / 'out'}" in "".join(capsys.readouterr().err.split("\n"))) == terminal
    for text in ("looking at the model", "the final model on each client", "clients before and after they adapt"):
        assert (f"fedavg: {text}" in told) == (terminal and show is None)


SUMMARISED = [
    (fp.fedsparse(density=0.5), "vit", True),
    (fp.grouplasso(), "vit", True),
    (fp.fedsparse(density=0.5), "mlp", False),
    (fp.fedavg(), "vit", False),
]


@pytest.mark.parametrize(("algorithm", "name", "told"), SUMMARISED, ids=str)
def test_a_summary_names_layers_that_stay_whole_besides_the_outputs(algorithm, name, told):
    train, _ = fp.data.load("digits")
    model = fp.models.vit(8, 4, 12, 3, 1, 20) if name == "vit" else fp.models.mlp(64, (6, 5), 10)
    clients = fp.data.iid(fp.Examples(train.x[:40], train.y[:40]), 2)
    result = fp.run(algorithm, model, clients, rounds=1, progress=False)
    lines = result.summary().splitlines()
    assert lines[1:] == ([f"  {left_whole(model, result.algorithm.prior)}"] if told else [])


def test_norms_embeddings_and_recurrent_layers_are_named_with_their_kind():
    model = fp.models.vit(8, 4, 12, 3, 1, 20)
    bound = fp.fedsparse(density=0.5).bind(model, fp.data.load("digits")[0].x[:1])
    assert left_whole(model, bound.prior) == (
        "layers that stay whole: patches (Conv2d), positions (Embedding), blocks.0.norm1 (LayerNorm), blocks.0.norm2 "
        "(LayerNorm), blocks.0.attention.out (Linear), blocks.0.second (Linear), norm (LayerNorm), head (Linear)"
    )
    model = CharLSTM()
    bound = fp.fedsparse(density=0.9).bind(model, torch.zeros(1, 5, dtype=torch.int64))
    want = "layers that stay whole: embedding (Embedding), before.2 (Linear), lstm (LSTM), head.2 (Linear)"
    assert left_whole(model, bound.prior) == want
