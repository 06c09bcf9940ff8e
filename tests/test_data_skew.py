"""The skew of each partition is the one its documentation promises."""

from __future__ import annotations

import pytest
import torch

from fedprior import data
from fedprior.core import Examples


def labelled(count: int, classes: int = 10) -> Examples:
    """Labels as equally frequent as can be."""
    return Examples(torch.zeros(count, 1), torch.arange(count) % classes)


def entropy(counts: torch.Tensor) -> torch.Tensor:
    """Of the labels of each row, in nats."""
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize(("count", "clients"), [(100, 10), (103, 10), (7, 7)])
def test_iid_clients_are_equal_up_to_one(count, clients):
    sizes = {len(c.train) for c in data.iid(labelled(count), clients)}
    assert sizes <= {count // clients, -(-count // clients)}


def test_label_entropy_follows_alpha():
    examples = labelled(20_000)
    whole = entropy(torch.bincount(examples.y).float())
    assert entropy(data.iid(examples, 20).label_counts()).mean() > 0.99 * whole
    mean = [
        float(entropy(data.dirichlet(examples, 20, a, min_examples=0).label_counts()).mean())
        for a in (0.05, 0.5, 5.0, 500.0)
    ]
    assert mean == sorted(mean)
    assert mean[0] < 0.4 * whole and mean[-1] > 0.99 * whole


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_their_mean_and_variance(alpha):
    clients, classes, seeds, per_class = 10, 5, 200, 400
    examples = labelled(per_class * classes, classes)
    shares = (
        torch.stack(
            [data.dirichlet(examples, clients, alpha, seed, min_examples=0).label_counts() for seed in range(seeds)]
        )
        .double()
        .div(per_class)
    )  # (seeds, clients, classes)
    assert torch.allclose(shares.sum(1), torch.ones(seeds, classes).double())
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    draws = seeds * classes
    error = (variance / draws) ** 0.5
    # client by client, and label by label: five standard errors
    assert (shares.mean((0, 2)) - mean).abs().max() < 5 * error
    # rounding to whole examples adds at most 1 / (4 per_class^2), and the squares spread too
    squares = (shares - mean) ** 2
    spread = squares.std() / squares.numel() ** 0.5
    assert (squares.mean() - variance).abs() < 5 * spread + 0.25 / per_class**2
    # the labels are drawn one by one: a client's shares of two labels are not correlated
    centred = (shares - mean) / shares.std()
    for label in range(1, classes):
        product = (centred[:, :, 0] * centred[:, :, label]).mean()
        assert product.abs() < 5 / (seeds * clients) ** 0.5


def test_dirichlet_gives_every_client_its_minimum():
    sizes = data.dirichlet(labelled(500), 10, 0.3, min_examples=10).offsets.diff()
    assert sizes.min() >= 10 and sizes.max() > sizes.min()


def test_dirichlet_takes_any_integer_labels():
    examples = Examples(torch.zeros(90, 1), torch.tensor([-5, 7, 1000]).repeat(30))
    labels = torch.cat([c.train.y for c in data.dirichlet(examples, 3, 1.0)])
    assert torch.equal(labels.sort().values, examples.y.sort().values)


@pytest.mark.parametrize("per_client", [1, 2, 5])
def test_shards_hold_one_label_each_when_they_divide_it(per_client):
    clients = 20
    population = data.shards(labelled(1000), clients, per_client)  # 10 labels of 100
    labels = (population.label_counts() > 0).sum(1)
    assert labels.max() <= per_client
    assert set(population.offsets.diff().tolist()) == {1000 // clients}


@pytest.mark.parametrize(("count", "clients", "per_client"), [(997, 13, 2), (501, 30, 3)])
def test_shards_straddle_at_most_the_borders_of_labels(count, clients, per_client):
    counts = data.shards(labelled(count), clients, per_client).label_counts()
    assert (counts > 0).sum() <= clients * per_client + 10 - 1
    assert (counts.sum(1) - count / clients).abs().max() < per_client


def test_shards_are_dealt_out_at_random():
    clients = 10

    def together(seed: int) -> set[tuple[bool, ...]]:
        counts = data.shards(labelled(1000), clients, seed=seed).label_counts()
        return {tuple(row) for row in (counts > 0).tolist()}

    # 2 runs of each of 10 labels: dealt in order, every seed would pair the same labels
    assert len({frozenset(together(seed)) for seed in range(5)}) == 5
