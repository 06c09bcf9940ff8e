"""ELSA: the loss and its gradient by formula, codes by hand, a plane that is found under three priors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fedprior as fp
from cases import redraw
from cli_calls import TINY, call
from fedprior import Client, Examples, structure
from fedprior.data import LazyPopulation
from fedprior.losses import LOSSES
from fedprior.objective import Objective
from fedprior.records import read
from fedprior.rng import generator

X = torch.randn(5, 1, 2, 3, generator=generator(0, "x"), dtype=torch.float64)


def made(chained: bool = False, autoencoders: int = 3) -> Any:
    return redraw(fp.models.elsa(6, 4, 2, autoencoders, chained).double())


def by_hand(model: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and reconstructions of one example (6,), layer by layer."""
    h, codes, decoded = x, [], []
    for encoder, decoder in zip(model.encoders, model.decoders, strict=True):
        parts = []
        inner = h
        for a, _, b in (encoder, decoder):
            inner = b.weight @ (a.weight @ inner + a.bias).clamp(min=0) + b.bias
            parts.append(inner)
        codes.append(parts[0])
        decoded.append(parts[1])
        h = decoded[-1] if model.chained else x
    return codes, decoded


@pytest.mark.parametrize("chained", [False, True])
def test_codes_reconstructions_and_loss_are_the_formula(chained: bool) -> None:
    model = made(chained)
    outputs, codes = model(X), model.encode(X)
    loss = LOSSES["autoencoder"]
    for i, x in enumerate(X):
        code, decoded = by_hand(model, x.flatten())
        assert torch.allclose(codes[i], torch.cat(code)) and torch.allclose(outputs[i], torch.stack(decoded))
        squares = [float((x.flatten() - d).detach().square().sum()) for d in decoded]
        for targets in (X, X.flatten(1)):
            assert float(loss.log_lik(outputs.detach(), targets)[i]) == pytest.approx(-0.5 * sum(squares))
            assert float(loss.scores["squared_error"](outputs.detach(), targets)[i]) == pytest.approx(sum(squares) / 3)


@pytest.mark.parametrize("chained", [False, True])
def test_the_gradient_is_that_of_small_steps(chained: bool) -> None:
    objective = Objective(made(chained), "autoencoder")
    phi = {k: v.requires_grad_() for k, v in objective.params().items()}
    grads = torch.autograd.grad(objective.log_lik(phi, X, X.flatten(1)), list(phi.values()))
    rng, size = generator(0, "direction"), 1e-6
    way = {k: torch.randn(v.shape, generator=rng, dtype=v.dtype) for k, v in phi.items()}
    ends = [
        float(objective.log_lik({k: v.detach() + s * way[k] for k, v in phi.items()}, X, X.flatten(1)))
        for s in (size, -size)
    ]
    want = sum(float((g * way[k]).sum()) for k, g in zip(phi, grads, strict=True))
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(want, rel=1e-6)


def test_a_chain_passes_gradients_back_and_parallel_ones_are_independent() -> None:
    for chained in (False, True):
        model = made(chained, 2)
        slope = torch.autograd.grad(model(X)[:, 1].sum(), model.encoders[0][0].weight, allow_unused=True)[0]
        assert (slope is not None and bool(slope.any())) == chained


def flat(seed: int = 0, size: int = 40) -> list[Client]:
    """Points on a plane in six dimensions, and a little beside it; labels are their signs."""
    rng = generator(seed, "plane")
    plane, found = torch.randn(2, 6, generator=rng), []
    for index in range(4):
        z = torch.randn(size, 2, generator=rng)
        x = z @ plane + 0.05 * torch.randn(size, 6, generator=rng)
        found.append(Client(index, f"client-{index}", Examples(x, (z[:, 0] > 0).long())))
    return found


SETTINGS = {
    "fedavg": fp.fedavg(0.02, 5),
    "ditto": fp.ditto(0.02, epochs=5),
    "fedsparse": fp.fedsparse(0.02, density=0.6, epochs=5),
}


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains_under_any_prior(name: str, chained: bool) -> None:
    """Between the error of the mean example and that of the plane itself, nearer to the plane."""
    clients = flat()
    x = torch.cat([c.train.x for c in clients])
    spread = torch.linalg.svdvals(x - x.mean(0)).square() / len(x)
    mean, best = float(spread.sum()), float(spread[2:].sum())
    test = fp.data.autoencoding(Examples(x, torch.zeros(len(x))))
    result = fp.run(
        SETTINGS[name],
        fp.models.elsa(6, 12, 3, chained=chained),
        fp.data.autoencoding(clients),
        rounds=30,
        test=test,
        loss="autoencoder",
        progress=False,
    )
    error = result.history[-1].metrics["squared_error"]
    assert best < error < best + 0.3 * (mean - best), (best, error, mean)
    assert result.history[-1].metrics["nats"] == pytest.approx(error)  # half the sum over two
    slim: Any = result.model()
    assert slim.encode(x).shape[1] <= 6 and slim(x).shape == (len(x), 2, 6)
    assert (sum(p.numel() for p in slim.parameters()) < 0.65 * 2 * 249) == (name == "fedsparse")


def test_the_command_line_trains_it_on_the_inputs(tmp_path: Path) -> None:
    """The named model brings its loss and targets along; what a run of labels would report is not there."""
    toml = tmp_path / "elsa.toml"
    toml.write_text(TINY + '[model]\nname = "elsa"\nhidden = 12\ncode = 4\n')
    call("run", toml, "--out", tmp_path / "out", "--quiet")
    first, last = (read(tmp_path / "out" / "records.jsonl")[i].metrics for i in (0, -1))
    assert last["squared_error"] < first["squared_error"] and "accuracy" not in last
    _, test = fp.data.load("digits")
    model = fp.models.elsa(64, 12, 4)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    with torch.no_grad():
        error = (model(test.x) - test.x.flatten(1)[:, None]).square().sum(2)
    assert last["nats"] == pytest.approx(float(error.sum(1).mean()) / 2, rel=1e-5)


def test_a_decoder_that_another_encoder_reads_is_no_group() -> None:
    """All units of the model's outputs stay; the others can go."""
    for chained in (False, True):
        names = [g.name for g in structure.groups(made(chained, 2), X)]
        assert sorted(names) == sorted(
            [f"{part}.{k}.0" for part in ("encoders", "decoders") for k in range(2)]
            + [f"encoders.{k}.2" for k in range(2)]
        )


def test_targets_are_the_inputs_of_all_clients_whatever_holds_them() -> None:
    examples = Examples(X, torch.arange(5))
    partition = fp.data.iid(examples, 2, holdout=0.4)
    listed = list(partition)
    for population in (partition, listed, LazyPopulation(2, lambda i: listed[i])):
        made = fp.data.autoencoding(population)
        for i, client in enumerate(listed):
            assert torch.equal(made[i].train.x, client.train.x) and client.held_out is not None
            for data, want in ((made[i].train, client.train), (made[i].held_out, client.held_out)):
                assert torch.equal(data.y, want.x.flatten(1))
    assert fp.data.autoencoding(fp.data.by_key(replace(examples, keys=list("ababa")))).names == ("a", "b")
    assert fp.data.autoencoding(replace(examples, keys=list("ababa"))).keys == list("ababa")
    assert fp.data.autoencoding([Client(0, "c", examples)])[0].held_out is None


def test_one_reconstruction_is_regression_on_the_inputs() -> None:
    outputs = torch.randn(5, 6, generator=generator(0, "outputs"), dtype=torch.float64)
    for loss in ("autoencoder", "regression"):
        got = LOSSES[loss].log_lik(outputs, X.flatten(1)), LOSSES[loss].scores["squared_error"](outputs, X.flatten(1))
        want = [(o - x.flatten()).square().sum() for o, x in zip(outputs, X, strict=True)]
        assert torch.allclose(got[0], -0.5 * torch.stack(want)) and torch.allclose(got[1], torch.stack(want))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an autoencoder's targets are its inputs.*fedprior\.data\.autoencoding"):
        fp.run(fp.fedavg(), fp.models.elsa(6, 4, 2), flat(), rounds=1, loss="autoencoder", progress=False)
    numbers = Examples(torch.zeros(4, 6), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"reconstruct no targets of torch\.float32 and shape \(2, 1\)"):
        clients = [Client(0, "numbers", numbers)]
        fp.run(fp.fedavg(), fp.models.elsa(6, 4, 2), clients, rounds=1, loss="autoencoder", progress=False)
    with pytest.raises(ValueError, match=r"reconstruct no targets of torch\.float32 and shape \(2, 6\)"):
        fp.run(fp.fedavg(), nn.Linear(6, 5), fp.data.autoencoding(flat()), rounds=1, loss="autoencoder", progress=False)
    with pytest.raises(ValueError, match="elsa needs sizes of at least 1"):
        fp.models.elsa(6, 4, 2, autoencoders=0)
