"""Views of images in a forward of the user's own: our layers prefer other orders of memory, and nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from cases import image_clients, pooled
from fedprior.objective import Objective

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "of each example": lambda x: x.view(x.size(0), -1),
    "of so many values": lambda x: x.view(-1, x[0].numel()),
    "as another tensor": lambda x: x.view_as(torch.empty(len(x), x[0].numel())),
}
BODIES: dict[str, Callable[[], list[nn.Module]]] = {
    "few filters": lambda: [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)],
    "few filters and a pool": lambda: [nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3)],
    "full blocks": lambda: [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)],
    "batch norm": lambda: [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1, stride=2)],
}


class Viewed(nn.Module):
    """Layers for images, their values in a row, two dense layers."""

    def __init__(self, body: str, flat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.flat = nn.Sequential(*BODIES[body]()), flat
        self.hidden, self.head = nn.LazyLinear(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.flat(self.body(x))).relu())


def flatten(x: Tensor) -> Tensor:
    return x.flatten(1)


def result(body: str, flat: Callable[[Tensor], Tensor], algorithm: fp.Algorithm) -> fp.Result:
    clients = image_clients(3, 20)
    model = Viewed(body, flat)
    model.eval()(clients[0].train.x)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-0.3, 0.3, p.numel()).sin().roll(i).view_as(p))
    return fp.run(algorithm, model, clients, rounds=3, test=pooled(clients))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("algorithm", [fp.fedavg(0.05), fp.fedsparse(0.05, 0.5)], ids=lambda a: a.name)
def test_runs_of_views_are_those_of_flat_values(body: str, algorithm: fp.Algorithm) -> None:
    want = result(body, flatten, algorithm)
    for name, view in VIEWS.items():
        got = result(body, view, algorithm)
        assert got.parameters_left == want.parameters_left
        assert all(torch.allclose(v, want.params[k], atol=1e-5) for k, v in got.params.items()), name
        assert got.nats == pytest.approx(want.nats, abs=1e-4)


def test_a_view_that_there_is_in_no_order_is_refused_in_pytorchs_words() -> None:
    x, model = torch.zeros(3, 1, 10, 10), Viewed("few filters", lambda x: x.view(len(x), 7, -1))
    model.hidden = nn.Linear(1, 7)
    objective = Objective(model)
    with pytest.raises(RuntimeError, match=r"\[3, 7, -1\].* size 540"):
        objective.outputs(objective.params(), x)


@pytest.mark.parametrize(
    ("flat", "watched"), [(flatten, False), (VIEWS["of each example"], True)], ids=["flat", "views"]
)
def test_only_models_that_ask_for_views_are_watched_after_the_first_call(
    flat: Callable[[Tensor], Tensor], watched: bool
) -> None:
    x, model = torch.zeros(2, 1, 10, 10), Viewed("few filters", flat)
    model(x)
    objective, own = Objective(model), Objective(fp.models.lenet((3, 4), 5))
    assert objective._views is not None and own._views is None
    objective.outputs(objective.params(), x)
    assert (objective._views is not None) == watched


def test_an_export_says_what_fixes_the_number_of_examples(tmp_path: Path) -> None:
    exported = result("few filters", lambda x: x.reshape(len(x), -1), fp.fedavg())
    with pytest.raises(ValueError, match=r"fixes the number of examples, as len\(x\) does.* or x.shape\[0\]"):
        fp.export(exported, tmp_path / "a.pt2")
    exported = result("few filters", lambda x: x.reshape(x.shape[0], -1), fp.fedavg())
    assert fp.export(exported, tmp_path / "a.pt2").difference <= 1e-5
