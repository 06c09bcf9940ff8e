"""Choosing units: sizes against a count of entries, the greedy choice against all choices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fedprior as fp
from cases import count_alive
from fedprior import selection, structure
from fedprior.objective import Objective
from fedprior.rng import generator
from fedprior.selection import Live
from test_slim import MODELS, setting


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Of what counts."""
    return {name: p.shape for name, p in model.named_parameters()}


def gains(groups, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = generator(seed, "gains")
    return {g.name: torch.rand(g.units, generator=rng, dtype=torch.float64) for g in groups}


@pytest.mark.parametrize("name", MODELS)
def test_live_counts_what_a_mask_leaves(name: str) -> None:
    model, _, cut, params = setting(name)
    counted = {k: params[k] for k in shapes(model)}
    gate = cut.all_units({g: torch.ones(len(k), dtype=torch.float64) for g, k in cut.kept.items()})

    def left(z) -> int:
        return count_alive(structure.alive(cut.groups, z, params), counted)

    live = Live(cut.groups, gate, {k: v.shape for k, v in counted.items()})
    assert live.total() == left(gate)
    for group in cut.groups:
        costs = live.costs(group.name)
        for unit in range(group.units):
            closed = {**gate, group.name: gate[group.name].clone()}
            closed[group.name][unit] = 0
            assert costs[unit] == (left(gate) - left(closed) if gate[group.name][unit] else 0), (group.name, unit)
        owned = structure.owned(cut.groups, gate, params)
        rows = [k for k in counted if any(m.out and m.name == k for m in group.members)]
        on = structure.alive(cut.groups, gate, params)
        assert set(rows) <= owned.keys()
        assert live.entries == {k: count_alive({k: on[k]} if k in on else {}, {k: v}) for k, v in counted.items()}
        assert live.owned(group) == count_alive({k: on[k] for k in rows}, {k: counted[k] for k in rows})


@pytest.mark.parametrize("name", MODELS)
def test_closing_units_keeps_the_count_right(name: str) -> None:
    model, _, cut, params = setting(name)
    gate = {g.name: torch.ones(g.units, dtype=torch.float64) for g in cut.groups}
    live = Live(cut.groups, gate, shapes(model))
    for group in cut.groups:
        live.close(group.name, group.units - 1)
        gate[group.name][-1] = 0
        counted = {k: params[k] for k in shapes(model)}
        assert live.total() == count_alive(structure.alive(cut.groups, gate, params), counted)
        assert live.weight(group) == Live(cut.groups, gate, shapes(model)).weight(group)


def chosen(name: str, fraction: float, seed: int = 0):
    model, _, cut, params = setting(name)
    ones = {g.name: torch.ones(g.units, dtype=torch.float64) for g in cut.groups}
    allowed = fraction * sum(params[k].numel() for k in shapes(model))
    keep, price = selection.select(cut.groups, ones, gains(cut.groups, seed), shapes(model), allowed)
    live = Live(cut.groups, keep, shapes(model))
    return cut.groups, keep, price, live, allowed


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.0])
def test_what_is_left_is_allowed_and_no_group_is_lost(name: str, fraction: float) -> None:
    _, keep, price, live, allowed = chosen(name, fraction)
    assert all(set(z.unique().tolist()) <= {0.0, 1.0} and z.any() for z in keep.values())
    assert live.total() <= allowed or all(int(z.sum()) == 1 for z in keep.values())
    assert (price > 0) == any(not z.all() for z in keep.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_allowance_keeps_some_of_what_a_larger_one_keeps(name: str) -> None:
    keeps = [chosen(name, fraction)[1] for fraction in (0.8, 0.5, 0.2)]
    for more, less in itertools.pairwise(keeps):
        assert all(bool((less[g] <= more[g]).all()) for g in more)


@pytest.mark.parametrize("name", MODELS)
def test_the_least_is_what_selecting_and_narrowing_end_at(name: str) -> None:
    """Of all models with one unit a group the smallest; it is reached, and nothing is below it."""
    model, _, cut, params = setting(name)
    counted = {k: params[k] for k in shapes(model)}
    least = selection.least(cut.groups, shapes(model))
    assert chosen(name, 0.0)[3].total() == least
    keep = selection.narrow(cut.groups, params, 0, list(counted))
    assert count_alive(structure.alive(cut.groups, keep, params), counted) == least
    for unit in (0, -1):
        one = {g.name: torch.eye(g.units, dtype=torch.float64)[unit] for g in cut.groups}
        assert count_alive(structure.alive(cut.groups, one, params), counted) >= least


@pytest.mark.parametrize("spare", [0, 4])
def test_units_of_one_size_are_chosen_as_by_trying_all_choices(spare: int) -> None:
    """One hidden layer: every unit costs the same, the greedy choice is the optimum, and no room is wasted."""
    model = fp.models.mlp(4, (7,), 3).double()
    groups = structure.groups(model, torch.zeros(1, 4).double())
    worth = gains(groups)
    ones = {groups[0].name: torch.ones(7, dtype=torch.float64)}
    each = 4 + 1 + 3
    for count in range(1, 8):
        keep, price = selection.select(groups, ones, worth, shapes(model), 3 + each * count + spare)
        gain = worth[groups[0].name]
        best = max(itertools.combinations(range(7), count), key=lambda units: sum(float(gain[u]) for u in units))
        assert keep[groups[0].name].nonzero().flatten().tolist() == list(best)
        dropped = gain[keep[groups[0].name] == 0]
        share = each / (3 + 7 * each)
        assert price == pytest.approx(float(dropped.max()) / share if len(dropped) else 0.0)


def test_a_price_separates_what_stays_from_what_goes() -> None:
    """Sizes only shrink as units go, so that what stays is worth the price of the last that went."""
    groups, keep, price, live, _ = chosen("lenet", 0.5)
    worth = gains(groups)
    for g in groups:
        stays = keep[g.name] > 0
        ratio = worth[g.name][stays] / torch.from_numpy(live.shares(g.name))[stays]
        assert price > 0 and float(ratio.min()) >= price * (1 - 1e-12)


def test_closed_units_stay_closed() -> None:
    model, _, cut, params = setting("lenet")
    gate = cut.all_units({g: torch.ones(len(k), dtype=torch.float64) for g, k in cut.kept.items()})
    everything = sum(v.numel() for v in params.values())
    keep, price = selection.select(cut.groups, gate, gains(cut.groups), shapes(model), everything)
    assert price == 0 and all(torch.equal(keep[g], gate[g]) for g in gate)


@pytest.mark.parametrize("fraction", [1.0, 0.6, 0.2, 0.0])
def test_a_narrow_start_takes_the_smallest_units_of_the_largest_layer(fraction: float) -> None:
    model = fp.models.mlp(6, (20, 5), 3).double()
    groups, params = structure.groups(model, torch.zeros(1, 6).double()), Objective(model).params()
    total = sum(v.numel() for v in params.values())
    keep = selection.narrow(groups, params, fraction * total, shapes(model))
    live = Live(groups, keep, {k: v.shape for k, v in params.items()})
    open_units = [int(z.sum()) for z in keep.values()]
    assert live.total() <= fraction * total or open_units == [1, 1]
    assert (open_units == [20, 5]) == (fraction == 1.0)
    for group in groups:
        layer = group.name
        norms = params[f"{layer}.weight"].square().sum(1) + params[f"{layer}.bias"].square()
        stays = keep[layer] > 0
        assert stays.all() or norms[stays].min() > norms[~stays].max()
    if fraction == 0.6:  # 20 x 7 against 5 x 21 entries at the start: the first layer gives more
        assert 20 - open_units[0] > 5 - open_units[1]


def test_the_largest_layer_is_not_the_one_with_the_most_units() -> None:
    """6 units of 20 + 1 entries own more than 12 of 6 + 1."""
    model = fp.models.mlp(20, (6, 12), 3).double()
    groups, params = structure.groups(model, torch.zeros(1, 20).double()), Objective(model).params()
    keep = selection.narrow(groups, params, sum(v.numel() for v in params.values()) - 1, shapes(model))
    assert [int(keep[g.name].sum()) for g in sorted(groups, key=lambda g: g.name)] == [5, 12]


def test_activations_are_counted_by_hand() -> None:
    """Outputs of all layers that make a unit: 10 x 10 positions of a filter, 1 of a neuron, 5 tokens of a head."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(192, 4))
    net.append(nn.Linear(4, 2))
    x = torch.zeros(2, 1, 12, 12)
    made = selection.activations(structure.groups(net, x), net, x)
    assert [a.tolist() for a in made.values()] == [[10 * 10 + 8 * 8] * 3, [1.0] * 4]
    text = fp.models.char_transformer(9, 5, 8, 2, 4, depth=1, hidden=6, every=True)
    letters = torch.zeros(1, 5, dtype=torch.int64)
    made = selection.activations(structure.groups(text, letters), text, letters)
    assert sorted(a.tolist() for a in made.values()) == [[5.0] * 6, [5.0 * 4 * 3] * 2]


def test_costly_activations_go_first() -> None:
    """Equal gains, and neurons that own more: without their activations the filters stay, with them the filters go."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 16), nn.ReLU()
    )
    net.append(nn.Linear(16, 40))
    x = torch.zeros(1, 1, 12, 12)
    groups, params = structure.groups(net, x), Objective(net).params()
    ones = {g.name: torch.ones(g.units) for g in groups}
    made = selection.activations(groups, net, x)
    made = {g: a / sum(float(v.sum()) for v in made.values()) for g, a in made.items()}
    allowed = sum(v.numel() for v in params.values()) - 10
    for costs, loser in ((None, "4"), (made, "0")):
        by_gain, _ = selection.select(groups, ones, ones, shapes(net), allowed, costs)
        for keep in (by_gain, selection.narrow(groups, params, allowed, shapes(net), costs)):
            assert [g for g, z in keep.items() if not z.all()] == [loser]
