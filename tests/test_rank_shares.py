"""What ranks share out and add up: balanced shares of the clients, and a total that no order changes."""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
import torch

import fedprior as fp
from fedprior.engines.costs import Costs
from fedprior.engines.total import Total, rounded
from fedprior.rng import numpy_generator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def law_of_costs(seed: int) -> tuple[list[int], Costs, int]:
    rng = numpy_generator(seed, "costs")
    indices = sorted(int(i) for i in rng.choice(100, size=int(rng.integers(1, 40)), replace=False))
    costs = Costs()
    for index in indices[:: int(rng.integers(1, 3))]:
        costs.saw(index, float(rng.lognormal()))
    return indices, costs, int(rng.integers(1, 6))


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_a_partition_and_balanced(seed: int) -> None:
    """No share exceeds the least one by more than its own cheapest client: that one was the last to be added."""
    indices, costs, ranks = law_of_costs(seed)
    shares = costs.dealt(indices, ranks)
    assert sorted(i for share in shares for i in share) == indices and all(share == sorted(share) for share in shares)
    dearest = max(costs.seconds.values())
    each = [[costs.seconds.get(i, dearest) for i in share] for share in shares]
    for cost in each:
        assert sum(cost) - min(cost, default=0.0) <= min(map(sum, each)) + 1e-12
    again = Costs(dict(sorted(costs.seconds.items())))  # whatever order they were seen in
    assert again.dealt(indices, ranks) == shares


def test_a_total_does_not_depend_on_the_order() -> None:
    """float32 values over 20 binary orders of magnitude: the sum of the fractions, rounded once."""
    rng = numpy_generator(0, "total")
    values = torch.from_numpy(rng.normal(size=(50, 200)) * 2.0 ** -rng.integers(0, 20, size=(50, 200))).float()
    exact = [float(sum(map(Fraction, column))) for column in values.T.tolist()]
    want = torch.tensor(exact, dtype=torch.float64).float()
    for order in (range(50), reversed(range(50)), rng.permutation(50).tolist()):
        total = Total()
        for i in order:
            total.add(fp.Stats({"phi": {"w": values[i].view(10, 20)}}, 0.5))
        stats = rounded(total.values, total.layout, total.clients)
        assert torch.equal(stats["phi"]["w"], want.view(10, 20)) and stats.clients == 25.0
    with pytest.raises(ValueError, match="cannot add"):
        total.add(fp.Stats({"phi": {"w": values[0]}}))
