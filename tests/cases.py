"""The tables of cases, and the small clients and models that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

import fedprior as fp
from draws import (
    confident,
    diagonal,
    drawn_gates,
    drawn_rules,
    expected_gates,
    gains,
    mixed,
    mixed_gains,
    normal,
    point,
    precise,
    scaled,
    site,
    taught,
    tilted,
)
from fedprior import Client, Examples, Params, Stats, inference, priors, tree
from fedprior.objective import Objective
from fedprior.rng import generator
from fedprior.slim import Cut
from learned_scale import LearnedScale


def conv_net() -> nn.Module:
    """Images of 8 x 8; three gateable layers."""
    layers = [nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return redraw(net)


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters drawn from our own generator: the global one decides nothing here."""
    rng = generator(seed, "redraw")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return model


PLAIN: Params = {"weight": torch.zeros(3, 2, dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}
IMAGES = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
VECTORS = torch.zeros(1, 4, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A prior, the parameters it is over, and a random posterior of one client.

    Attributes:
        curved: False if log_prob does not depend on some field of eta (the flat limit).
        e_step: an inference whose `start` fits the prior; None for the usual one.
    """

    name: str
    prior: Any
    params: Params
    posterior: Callable[[Case, torch.Generator], Any]
    curved: bool = True
    e_step: Any = None

    def __str__(self) -> str:
        return self.name

    def eta(self, seed: int = 0) -> Any:
        return self.prior.init(normal(generator(seed, "eta"), self.params))

    def client(self, seed: int) -> Stats:
        return self.prior.stats(self.posterior(self, generator(seed, "posterior")))

    def clients(self, count: int = 5) -> list[Stats]:
        """Statistics of clients with unequal weights."""
        return [self.client(seed).weighted(0.5 + seed) for seed in range(count)]

    def with_prior(self, prior: Any) -> Case:
        return replace(self, prior=prior)


def bound(prior: Any, model: nn.Module, x: Tensor) -> dict[str, Any]:
    return {"prior": prior.bind(model, x), "params": Objective(model).params()}


MLP = fp.models.mlp(4, (3, 2), 2).double()
CONV = conv_net()
RULES = fp.models.rules(3).double()
SHARED = [priors.SharedGates(0.5, 0.8, 4, precision, hold=0) for precision in (0.0, 3.0)]
MIXED = inference.Mixture(inference.Point(0.1))
PRIORS = [
    Case("gaussian-0", priors.Gaussian(), PLAIN, point, curved=False),
    Case("gaussian-2", priors.Gaussian(2.0), PLAIN, point),
    Case("gaussian-2-diagonal", priors.Gaussian(2.0), PLAIN, diagonal),
    Case("learned-scale", LearnedScale(floor=1e-9), PLAIN, point),
    Case("learned-scale-diagonal", LearnedScale(floor=1e-9), PLAIN, diagonal),
    Case("spike-slab-mlp", **bound(priors.SpikeSlab(0.3), MLP, VECTORS), posterior=expected_gates, curved=False),
    Case("spike-slab-mlp-3", **bound(priors.SpikeSlab(0.3, 3.0), MLP, VECTORS), posterior=expected_gates),
    Case("spike-slab-mlp-3-drawn", **bound(priors.SpikeSlab(0.3, 3.0), MLP, VECTORS), posterior=drawn_gates),
    Case("spike-slab-conv", **bound(priors.SpikeSlab(0.1), CONV, IMAGES), posterior=expected_gates, curved=False),
    Case("spike-slab-conv-3", **bound(priors.SpikeSlab(0.1, 3.0), CONV, IMAGES), posterior=expected_gates),
    Case("group-lasso-mlp", **bound(priors.GroupLasso(0.1), MLP, VECTORS), posterior=point, curved=False),
    Case("group-lasso-conv-2", **bound(priors.GroupLasso(0.1, 2.0), CONV, IMAGES), posterior=point),
    Case(
        "shared-gates-mlp",
        **bound(SHARED[0], MLP, VECTORS),
        posterior=gains,
        curved=False,
    ),
    Case("shared-gates-conv-3", **bound(SHARED[1], CONV, IMAGES), posterior=gains),
    Case("dropout-mlp", **bound(priors.Dropout(), MLP, VECTORS), posterior=drawn_gates, curved=False),
    Case("dropout-mlp-3", **bound(priors.Dropout(0.5, 3.0), MLP, VECTORS), posterior=drawn_gates),
    Case("dropout-conv-3", **bound(priors.Dropout(0.5, 3.0), CONV, IMAGES), posterior=drawn_gates),
    Case("scaffold", priors.Scaffold(), PLAIN, tilted, curved=False, e_step=inference.Tilted(0.1)),
    Case("online-laplace", priors.OnlineLaplace(2.0), PLAIN, precise, e_step=inference.Laplace(0.1)),
    Case("niw", priors.NIW(0.5, 2.0, 4.0, 0.125), PLAIN, point),
    Case("niw-diagonal", priors.NIW(spread=0.0), PLAIN, diagonal),
    Case("learned-scale-of-the-library", priors.LearnedScale(1e-9), PLAIN, diagonal),
    Case("random-effects", priors.RandomEffects(floor=1e-9), PLAIN, point, e_step=inference.Chain(0.1)),
    Case("random-effects-diagonal", priors.RandomEffects(floor=1e-9), PLAIN, diagonal, e_step=inference.Chain(0.1)),
    Case("laplace", priors.ScaleMixture("laplace"), PLAIN, scaled, e_step=inference.Reweighted(0.1)),
    Case("horseshoe", priors.ScaleMixture("horseshoe"), PLAIN, scaled, e_step=inference.Reweighted(0.1)),
    Case(
        "confidence",
        priors.Confidence(0.5, names=("weight",)),
        PLAIN,
        confident,
        curved=False,
        e_step=inference.Confidence(0.1),
    ),
    Case("distilled", priors.Distilled(), PLAIN, taught, curved=False, e_step=inference.Langevin(0.1, 0.1)),
    Case("sites", priors.Sites(0.5), PLAIN, site, e_step=inference.Sites()),
    Case("mixture-0", priors.Mixture(), PLAIN, mixed, curved=False, e_step=MIXED),
    Case("mixture-2", priors.Mixture(prior=priors.Gaussian(2.0)), PLAIN, mixed, e_step=MIXED),
    Case("centres", priors.Centres(3, priors.Gaussian(2.0), ridge=0.5), PLAIN, mixed, e_step=inference.Centres(0.1)),
    Case(
        "sparse-mixture-mlp",
        **bound(priors.SparseMixture(2, SHARED[0]), MLP, VECTORS),
        posterior=mixed_gains,
        curved=False,
        e_step=inference.Mixture(inference.Gains(0.1), hard=True),
    ),
    Case(
        "sparse-mixture-conv-3",
        **bound(priors.SparseMixture(2, SHARED[1]), CONV, IMAGES),
        posterior=mixed_gains,
        e_step=inference.Mixture(inference.Gains(0.1), hard=True),
    ),
    Case("rules", priors.Rules(0.5, RULES.bodies), {"rule": RULES.rule}, drawn_rules, e_step=inference.Rules(0.1)),
    Case("feddyn-2", priors.FedDyn(2.0), PLAIN, tilted, e_step=inference.Tilted(0.1)),
]


def split(first: Case) -> Case:
    """A prior of the table over its own parameters, and a Gaussian over two more."""
    more = {f"more.{k}": v for k, v in PLAIN.items()}
    prior = priors.Split({"more.*": priors.Gaussian(2.0), "*": first.prior})

    def both(case: Case, rng: torch.Generator) -> Any:
        return Wider(first.posterior(first, rng), normal(rng, more))

    return Case(f"split-{first.name}", prior, {**first.params, **more}, both, first.curved)


class Wider:
    """A posterior, and a point in further parameters."""

    def __init__(self, q: Any, more: Params) -> None:
        self.q, self.more = q, more

    def mean(self) -> Params:
        return {**self.q.mean(), **self.more}

    def second_moment(self) -> Params:
        return {**self.q.second_moment(), **tree.map(torch.square, self.more)}


SPLITS = [split(case) for case in PRIORS if case.posterior in (point, diagonal)]  # moments are all that a part sees
PERSONAL_HEAD = priors.Split({"@head": priors.Personal(), "*": priors.Gaussian(2.0)})
SPLITS += [Case("split-personal", **bound(PERSONAL_HEAD, MLP, VECTORS), posterior=point)]


def total(stats: Sequence[Stats]) -> Stats:
    return reduce(add, stats)


def classification_clients(
    sizes: Sequence[int], inputs: int = 4, classes: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Client]:
    """Clients of unequal sizes around class means of their own, each a little shifted."""
    rng = generator(seed, "clients")
    means = 2 * torch.randn(classes, inputs, generator=rng, dtype=dtype)
    clients = []
    for index, size in enumerate(sizes):
        y = torch.randint(classes, (size,), generator=rng)
        shift = 0.3 * torch.randn(inputs, generator=rng, dtype=dtype)
        x = means[y] + shift + torch.randn(size, inputs, generator=rng, dtype=dtype)
        clients.append(Client(index, f"client-{index}", Examples(x, y)))
    return clients


def image_clients(count: int, size: int = 24, seed: int = 0) -> list[Client]:
    """Noisy 16 x 16 images whose class is a bright corner."""
    rng = generator(seed, "images")
    clients = []
    for index in range(count):
        y = torch.randint(4, (size,), generator=rng)
        x = 0.3 * torch.randn(size, 1, 16, 16, generator=rng)
        for i, corner in enumerate(y.tolist()):
            top, left = 8 * (corner // 2), 8 * (corner % 2)
            x[i, 0, top : top + 8, left : left + 8] += 1
        clients.append(Client(index, f"client-{index}", Examples(x, y)))
    return clients


def pooled(clients: Sequence[Client]) -> Examples:
    return Examples(torch.cat([c.train.x for c in clients]), torch.cat([c.train.y for c in clients]))


def everywhere(z: Params, params: Params) -> Params:
    """z in the shapes of the parameters; 1 where no group holds an entry."""
    return {k: z[k].expand_as(p) if k in z else torch.ones_like(p) for k, p in params.items()}


def equal(a: Params, b: Params) -> bool:
    """The same names, and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def close(a: Params, b: Params, tolerance: float = 1e-12) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(v, b[k], rtol=tolerance, atol=tolerance) for k, v in a.items())


def without_seconds(history: Sequence[fp.Round]) -> list[fp.Round]:
    """Records without wall times: what must be equal between equal runs."""
    rows = [replace(r, clients=tuple(replace(c, seconds=0.0, seconds_wire=0.0) for c in r.clients)) for r in history]
    return [replace(r, seconds=0.0, seconds_evaluate=0.0, seconds_train=0.0, seconds_wire=0.0) for r in rows]


def hidden(history: Sequence[fp.Round]) -> list[fp.Round]:
    """Of a simulation's records, what a federation's server gets to know under secure sums."""
    return [replace(r, clients=tuple(replace(c, examples=0) for c in r.clients)) for r in without_seconds(history)]


class Lost(fp.Availability):
    """Those clients of those rounds do not answer."""

    def __init__(self, lost: Collection[tuple[int, int]]) -> None:
        object.__setattr__(self, "lost", lost)

    def status(self, seed: int, number: int, index: int, examples: int) -> Any:
        return "dropped" if (number, index) in self.lost else "ok"  # type: ignore


def lost_of(result: fp.Result) -> set[tuple[int, int]]:
    """Round and client of what did not arrive."""
    return {(r.number, c.index) for r in result.history for c in r.lost()}


def count_alive(z: Params, params: Params) -> int:
    """How many entries of `params` have z_j > 0; an entry that z does not name is alive."""
    return sum(int((z[k] > 0).expand_as(p).sum()) if k in z else p.numel() for k, p in params.items())


def parameters_left(prior: priors.SpikeSlab, eta: Any) -> int:
    """What a cut leaves of the prior's parameters."""
    return tree.size(Cut.of(prior.groups, eta.keep).gather(eta.mean))
