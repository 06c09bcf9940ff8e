"""Gates by evidence: runs with an asked density."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import fedprior as fp
from cases import image_clients, pooled, without_seconds
from coupled_nets import CharLSTM
from fedprior import Client, Examples
from fedprior.codecs import schema_of
from fedprior.rng import generator

LONG = [({"hold": 6}, 6, 7), ({"steps": 5}, 6, 7), ({"hold": 3, "steps": 4}, 6, 7), ({"steps": 2}, 1, 2)]


@pytest.mark.parametrize(("fields", "rounds", "needed"), LONG)
def test_a_schedule_longer_than_the_run_is_refused_before_round_one(fields, rounds: int, needed: int, tmp_path) -> None:
    algorithm = fp.fedsparse(density=0.3)
    algorithm = replace(algorithm, prior=replace(algorithm.prior, **fields))  # type: ignore[type-var]
    model, clients = fp.models.lenet((3, 3), 4, 4, 16), image_clients(1, 12)
    with pytest.raises(ValueError, match=rf"hold \+ steps = \d \+ \d rounds, and the run has {rounds}") as error:
        fp.run(algorithm, model, clients, rounds=rounds, out=tmp_path / "run")
    assert not (tmp_path / "run").exists() and f"or run {needed} rounds" in str(error.value)
    fits = replace(algorithm.prior, steps=needed - (fields.get("hold") or int(0.45 * needed)))  # type: ignore[type-var]
    assert fits.scheduled(needed).hold + fits.steps == needed


def transformer() -> torch.nn.Module:
    """One block with 2 heads of 4 and 12 neurons, on a stream of width 8."""
    return fp.models.char_transformer(9, 5, 8, 2, 4, depth=1, hidden=12, every=True)


def text_run(make: Callable[[], torch.nn.Module], density: float, rounds: int) -> fp.Result:
    rng = generator(0, "text")
    texts = (torch.arange(2 * 8 * 6) * 5 % 7).view(2, 8, 6) + torch.randint(2, (2, 8, 1), generator=rng)
    clients = [Client(i, str(i), Examples(t[:, :-1], t[:, 1:])) for i, t in enumerate(texts)]
    return fp.run(fp.fedsparse(lr=0.02, batch_size=4, density=density), make(), clients, rounds=rounds)


HEAD, NEURON = 3 * (8 * 4 + 4) + 4 * 8, 8 + 1 + 8
STREAM = 3 * 16 + (9 + 5) * 8 + 8 * 9 + 9 + 8 + 8  # norms, embeddings, the last layer, biases of out and second
LSTM = 8 * 4 + 4 * 6 * (4 + 6 + 2) + 4 + 8  # embedding, LSTM, biases of before.2 and head.2
TEXTS = {  # model, rounds, parameters of what has no units, {parameters of a unit: how many}
    "transformer": (transformer, 6, STREAM, {HEAD: 2, NEURON: 12}),
    "user's own LSTM": (CharLSTM, 2, LSTM, {4 + 1 + 4: 5, 6 + 1 + 8: 8}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_densities_down_to_the_least_are_met_and_none_below_is_begun(name: str) -> None:
    """The least is one unit of each group, and all that has no units."""
    make, rounds, whole, units = TEXTS[name]
    least, total = whole + sum(units), whole + sum(size * count for size, count in units.items())
    exact = least / total
    result = text_run(make, exact, rounds)
    assert result.parameters == total and result.parameters_left == least
    middle = (exact + 1) / 2
    assert 0 <= middle * total - text_run(make, middle, rounds).parameters_left <= max(units)
    with pytest.raises(ValueError, match="cannot be reached") as error:
        text_run(make, exact - 0.01, rounds)
    largest = {"transformer": ("head", 8 * 9 + 9), "user's own LSTM": ("lstm", LSTM - 8 * 4 - 4 - 8)}[name]
    assert f"most in {largest[0]} ({largest[1] / total:.1%}), " in str(error.value)
    (named,) = re.findall(r"density >= ([0-9.]+)", str(error.value))
    assert exact <= float(named) < exact + 1e-5 and text_run(make, float(named), rounds).parameters_left == least


def run(rounds: int = 12, **fields) -> fp.Result:
    clients = image_clients(4, 40)
    algorithm = fp.fedsparse(lr=0.1, batch_size=8, **{"density": 0.2, **fields})
    model = fp.models.lenet((6, 8), 16, 4, 16)
    return fp.run(algorithm, model, clients, rounds=rounds, test=pooled(clients))


def test_a_run_meets_the_density_and_learns() -> None:
    result = run()
    counts = [r.parameters_left for r in result.history]
    assert counts == sorted(counts, reverse=True)
    assert all(0.2 - 0.06 <= c / result.parameters <= 0.2 for c in counts[8:])  # a filter is 6 % of this model
    assert result.accuracy > 0.8
    assert result.history[-1].bytes_up < 0.7 * result.history[0].bytes_up
    assert result.history[-1].bytes_down < 0.7 * result.history[0].bytes_down
    assert float(result.eta.price["lambda_0"]) > 0
    again = run()
    assert without_seconds(result.history) == without_seconds(again.history)


def test_a_client_predicts_with_what_it_has_made_of_the_slim_model() -> None:
    """As parameters of the full model, which computes the same."""
    result, client = run(6), image_clients(4, 40)[1]
    prior, eta = result.algorithm.prior, result.eta
    rng = generator(0, client.index, "personal")
    q, _ = result.algorithm.inference.e_step(result.objective, prior, eta, client, None, rng)
    small, x = result.objective.cut(prior.cut(eta)), client.train.x  # type: ignore[attr-defined]
    (own,) = result.personal(client).models
    assert schema_of(own) == schema_of(result.params)
    assert torch.allclose(result.objective.outputs(own, x), small.outputs(q.phi, x), atol=1e-5)
    assert result.parameters_left < result.parameters and not torch.equal(own["0.bias"], result.params["0.bias"])


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_an_unreliable_fleet_gets_the_density_on_time(seed: int) -> None:
    """Rounds in which nobody answers count: after hold + steps = 7 of 12 rounds the model is as small as asked."""
    clients, fleet = image_clients(4, 24), fp.Availability(dropout=0.6)
    algorithm = fp.fedsparse(lr=0.1, batch_size=8, density=0.2)
    model = fp.models.lenet((6, 8), 16, 4, 16)
    result = fp.run(algorithm, model, clients, rounds=12, cohort=2, availability=fleet, seed=seed)
    silent = [r.number for r in result.history if r.kept_eta]
    assert any(number <= 7 for number in silent) and silent[:7] != list(range(1, 8))
    assert float(result.eta.round["t"]) == 12
    assert all(r.parameters_left <= 0.2 * result.parameters for r in result.history[6:])
