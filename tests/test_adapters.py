"""Low-rank adapters: the same model at first, differences of low rank, clients with labels of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from cases import classification_clients, close
from fedprior import Client, Examples, Params, adapters, structure, wire
from fedprior.objective import params_of
from fedprior.rng import generator

CLIENTS = classification_clients((14, 9, 22))
MODEL = fp.models.mlp(4, (6,), 3)
SHARED = ("1.base.weight", "1.base.bias", "3.base.weight", "3.base.bias")


def adapters_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, adapters.LowRank)]


def merged(params: Params, layer: str) -> Tensor:
    return params[f"{layer}.base.weight"] + params[f"{layer}.lora_up.weight"] @ params[f"{layer}.lora_down.weight"]


def test_at_first_nothing_changes() -> None:
    """Nor does the model that was given, or PyTorch's global generator."""
    x, before, state = CLIENTS[0].train.x, params_of(MODEL), torch.get_rng_state()
    adapted = adapters.low_rank(MODEL, 2)
    assert torch.equal(adapted(x), MODEL(x)) and close(params_of(MODEL), before, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert close(params_of(adapted), params_of(adapters.low_rank(MODEL, 2)), 0)
    assert not close(params_of(adapted), params_of(adapters.low_rank(MODEL, 2, seed=1)), 0)
    adapted.get_parameter("1.base.weight").data.zero_()
    assert close(params_of(MODEL), before, 0)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3).double(), nn.Linear(4, 3, bias=False)])
def test_an_adapted_layer_is_one_with_another_weight(layer: nn.Linear) -> None:
    adapted, rng = adapters.low_rank(layer, 2), generator(0, "up")
    for p in adapted.parameters():
        p.data.copy_(torch.randn(p.shape, generator=rng))
    params = params_of(adapted)
    x = torch.randn(5, 4, generator=rng, dtype=layer.weight.dtype)
    weight = params["base.weight"] + params["lora_up.weight"] @ params["lora_down.weight"]
    wanted = x @ weight.T + params.get("base.bias", 0)
    assert torch.allclose(adapted(x), wanted, rtol=1e-5, atol=1e-5)


def test_clients_differ_by_a_low_rank() -> None:
    """W is the server's, U D the client's own, of rank 1 here; and no adapter is in a message."""
    algorithm = fp.fedper(0.5, personal=adapters.ADAPTERS)
    result = fp.run(algorithm, adapters.low_rank(MODEL, 1), CLIENTS, rounds=4, progress=False)
    server = result.algorithm.prior.point(result.eta)
    assert not server["1.lora_up.weight"].any() and not server["3.lora_up.weight"].any()
    for client in CLIENTS:
        kept = wire.part(result.store.load(client.index), "kept")
        assert kept is not None and set(kept) == set(server) - set(SHARED)
        own = server | kept
        for layer in "13":
            assert torch.linalg.matrix_rank(merged(own, layer) - merged(server, layer)) == 1
    plain = fp.run(fp.fedavg(0.5), MODEL, CLIENTS, rounds=4, progress=False)
    assert [r.bytes_up for r in result.history] == [r.bytes_up for r in plain.history]


def test_clients_of_opposite_labels() -> None:
    """A shared model is right for half of them, exactly; with adapters each has its own answer."""
    clients = []
    for index, client in enumerate(classification_clients((40, 40, 40), classes=2)):
        for twin in range(2):
            train = Examples(client.train.x, (client.train.y + twin) % 2)
            clients.append(Client(2 * index + twin, f"{index}-{twin}", train))
    mean = {}
    for name, personal in {"adapters": adapters.ADAPTERS, "none": None}.items():
        algorithm = fp.fedavg(0.2) if personal is None else fp.fedper(0.2, personal=personal)
        model = fp.models.softmax(4, 2) if personal is None else adapters.low_rank(fp.models.softmax(4, 2), 1)
        result = fp.run(algorithm, model, clients, rounds=20, progress=False)
        mean[name] = fp.metrics.over_clients(result.personalised(clients))["before_accuracy"]["mean"]
    assert mean["none"] == pytest.approx(0.5) and mean["adapters"] > 0.9


def test_only_named_layers() -> None:
    names = set(params_of(adapters.low_rank(MODEL, 2, layers="3")))
    assert names == {"1.weight", "1.bias", "3.base.weight", "3.base.bias", "3.lora_down.weight", "3.lora_up.weight"}


def test_attention_keeps_its_outputs_and_its_heads() -> None:
    """Seven dense layers: 4 of attention, 2 after it, the head. What can be removed of them is as before."""
    vit, x = fp.models.vit(8, 4, 8, 2, 1, 8), torch.randn(3, 1, 8, 8, generator=generator(0, "images"))
    adapted = adapters.low_rank(vit, 1)
    assert torch.equal(adapted(x), vit(x)) and len(adapters_of(adapted)) == 7
    units = {g.name: g.units for g in structure.groups(vit, x)}
    assert {g.name.removesuffix(".base"): g.units for g in structure.groups(adapted, x)} == units and len(units) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rank": 0}, "0 is the model itself"), ({"layers": "head"}, "no dense layer matches 'head'; the model has 1, 3")],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapters.low_rank(MODEL, **arguments)
