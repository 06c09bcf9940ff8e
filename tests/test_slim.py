"""What is left of a model computes, and learns, what the whole model does with its removed units closed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from cases import conv_net, count_alive, redraw
from coupled_nets import READS, Beside, Branches, CharLSTM, OneLayerBlock, Residual, Twice, gru_net, norm_net
from fedprior import inference, priors, structure, tree
from fedprior.objective import Objective
from fedprior.rng import generator
from fedprior.slim import Cut, removable, slim


def depthwise_net() -> nn.Module:
    """Pointwise, depthwise, pointwise; group norm over pairs of filters."""
    layers = [nn.Conv2d(1, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def grouped_net() -> nn.Module:
    """A grouped convolution, which stays whole with what it reads, and a hidden layer, which does not."""
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 6), nn.ReLU(), nn.Linear(6, 3))


class FixedHeads(fp.models.Attention):
    """Attention whose forward asks for the number of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        parts = (f(x).view(n, t, self.num_heads, self.head_dim) for f in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.reshape(n, t, self.num_heads * self.head_dim)).mean(1)


MODELS = {
    "grouped": (grouped_net, (1, 8, 8)),
    "fixed heads": (lambda: FixedHeads(12, 6), (5, 12)),
    "conv": (conv_net, (1, 8, 8)),
    "lenet": (lambda: fp.models.lenet((6, 8), 20), (1, 28, 28)),
    "mlp": (lambda: fp.models.mlp(12, (7, 6), 3), (12,)),
    "batch norm": (norm_net, (1, 8, 8)),
    "residual": (Residual, (1, 8, 8)),
    "one-layer block": (OneLayerBlock, (4,)),
    "concatenated": (Branches, (1, 8, 8)),
    "depthwise": (depthwise_net, (1, 8, 8)),
    "resnet, batch norm": (lambda: fp.models.resnet(20, "batch", width=4), (1, 16, 16)),
    "resnet, group norm": (lambda: fp.models.resnet(20, "group", width=8), (1, 16, 16)),
    "vit": (lambda: fp.models.vit(image=16, patch=4, width=12, heads=3, depth=2, hidden=20), (1, 16, 16)),
    "elsa": (lambda: fp.models.elsa(12, 7, 4), (12,)),
    "elsa, chained": (lambda: fp.models.elsa(12, 7, 4, chained=True), (12,)),
    "char transformer": (lambda: fp.models.char_transformer(8, 5, 12, 3, 4, depth=2, hidden=10), (5,)),
    "char gru": (gru_net, (5,)),
    **{f"char lstm, {reads}": (partial(CharLSTM, reads), (5,)) for reads in READS},
    "beside a gru": (Beside, (5, 4)),
    "layer called twice": (Twice, (8,)),
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def setting(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Cut, dict[str, Tensor]]:
    """A model, inputs, a cut at random (never a whole group), and its parameters."""
    make, shape = MODELS[name]
    model, rng = redraw(make().to(dtype)), generator(1, name)
    x = torch.randn(5, *shape, generator=rng, dtype=torch.float64).to(dtype)
    if name.startswith("char "):
        x = torch.randint(8, x.shape, generator=rng)
    groups = structure.groups(model, x)
    gate = {g.name: (torch.rand(g.units, generator=rng) < 0.6).to(dtype) for g in groups}
    for z in gate.values():
        z[0], z[-1] = 1.0, 0.0
    params = Objective(model).params()
    params |= {k: 0.5 + torch.rand(v.shape, generator=rng).to(dtype) for k, v in params.items() if ".running_" in k}
    return model, x, Cut.of(groups, gate), params


def what_is_left(cut: Cut, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 for entries that stay and 0 for those that are cut; shapes as in structure.alive."""
    one = next(iter(params.values())).new_ones(())
    return structure.alive(cut.groups, cut.all_units({g: one.repeat(len(k)) for g, k in cut.kept.items()}), params)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_masked_model(name: str, dtype: torch.dtype) -> None:
    """Up to a share of the largest output: logits of this LeNet reach 80, where one step of float32 is 8e-6."""
    model, x, cut, params = setting(name, dtype)
    whole, small, alive = Objective(model), Objective(slim(model, cut)), what_is_left(cut, params)
    whole.train(False)
    small.train(False)
    want, got = whole.outputs(structure.apply(alive, params), x), small.outputs(cut.gather(params), x)
    assert got.dtype == want.dtype == dtype
    tolerance = TOLERANCES[dtype] * want.abs().max()
    assert (got - want).abs().max() <= tolerance < (whole.outputs(params, x) - want).abs().max()
    assert tree.size(small.params()) == count_alive(alive, params) < tree.size(params)
    assert cut.removed == sum(g.units for g in cut.groups) - sum(g.units for g in cut.small_groups) > 0


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_model_of_a_slim_module_is_smaller_and_keeps_its_weights(dtype: torch.dtype) -> None:
    model, _, cut, _ = setting("lenet", dtype)
    for parameter in model.get_submodule("0").parameters():
        parameter.requires_grad_(False)
    small = slim(model, cut)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, cut.gather(Objective(model).params())[k]) for k, v in Objective(small).params().items())


@pytest.mark.parametrize("name", MODELS)
def test_scatter_and_gather(name: str) -> None:
    _, _, cut, params = setting(name)
    small = cut.gather(params)
    back = cut.scatter(small)
    assert all(torch.equal(cut.gather(back)[k], v) for k, v in small.items())
    gate = cut.all_units({g: torch.ones(len(k), dtype=torch.float64) for g, k in cut.kept.items()})
    masked = structure.apply(what_is_left(cut, params), params)
    assert all(torch.equal(back[k], v) for k, v in masked.items())
    assert all(torch.equal(cut.units(gate)[g], torch.ones(len(k)).double()) for g, k in cut.kept.items())


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_the_slim_model(name: str) -> None:
    """Numbered anew by the cut, and found anew in the slim model: the same members and units."""
    model, x, cut, params = setting(name)
    found = {g.name: g for g in structure.groups(slim(model, cut), x)}
    gate = {g.name: torch.rand(g.units, generator=generator(0, g.name)).double() for g in cut.small_groups}
    gate |= {g.name: torch.ones(1).double() for g in cut.small_groups if g.units == 1}  # nothing to find there
    small = cut.gather(params)
    want = structure.close_gates(tuple(found.values()), gate, small)
    got = structure.close_gates(cut.small_groups, gate, small)
    assert all(torch.equal(got[k], v) for k, v in want.items())


@pytest.mark.parametrize("name", ["conv", "mlp", "batch norm", "layer called twice"])
def test_gradients_are_those_of_the_masked_model(name: str) -> None:
    model, x, cut, params = setting(name)
    y = torch.arange(len(x)) % 3
    masked = structure.apply(what_is_left(cut, params), params)
    gradients = []
    for objective, start in ((Objective(model), masked), (Objective(slim(model, cut)), cut.gather(params))):
        phi = {k: v.clone().requires_grad_(k in objective.trainable) for k, v in start.items()}
        objective.train(False)
        value = objective.log_lik(phi, x, y)
        leaves = [phi[k] for k in objective.trainable]
        gradients.append(dict(zip(objective.trainable, torch.autograd.grad(value, leaves), strict=True)))
    whole = {k: gradients[0].get(k, torch.zeros_like(v)) for k, v in params.items()}
    want = cut.gather(whole)
    assert all(torch.allclose(g, want[k], atol=1e-10, rtol=0) for k, g in gradients[1].items())


def test_cuts_of_equally_many_units_are_told_apart() -> None:
    """The newest slim model is remembered, and knows what it was made by."""
    model, _, cut, _ = setting("mlp")
    objective, most = Objective(model), {g.name: range(g.units) for g in cut.groups}
    cuts = [Cut(cut.groups, {g: tuple(u)[g == closed :] for g, u in most.items()}) for closed in most]
    made = [objective.cut(one) for one in (*cuts, *cuts[1:], cut)]
    assert made[1] is made[2] and len({one.removed for one in cuts}) == 1
    for one, small in zip((*cuts, *cuts[1:], cut), made, strict=True):
        assert small.made_by == one
        assert tree.size(small.params()) == tree.size(one.gather(objective.params()))


def test_with_another_loss_the_slim_model_has_that_loss() -> None:
    model, _, cut, _ = setting("mlp")
    objective = Objective(model)
    before, other = objective.cut(cut), objective.with_loss(Objective(model, "regression").loss)
    assert other.cut(cut).loss is other.loss is not before.loss is objective.loss


@pytest.mark.parametrize("name", ["conv", "batch norm"])
def test_an_e_step_trains_only_what_is_left(name: str) -> None:
    model, x, cut, params = setting(name)
    prior = priors.SpikeSlab(0.01, groups=cut.groups)
    eta = prior.init(params)
    eta = prior.project(eta._replace(keep=cut.all_units(cut.units(eta.keep))))
    client = fp.Client(0, "c", fp.Examples(x, torch.arange(len(x)) % 3))
    q, _ = inference.Gated(0.1).e_step(Objective(model), prior, eta, client, None, generator(0, "e"))
    assert all(torch.equal(q.keep[g] > 0, k > 0) and (q.gate[g][k == 0] == 0).all() for g, k in eta.keep.items())
    gate = tree.map(lambda k: (k > 0).to(k), eta.keep)
    inside = structure.apply(structure.alive(cut.groups, gate, params), q.phi)
    assert all(torch.equal(inside[k], v) for k, v in q.phi.items())
    assert any(not torch.equal(q.phi[k], eta.mean[k]) for k in params)


def test_a_run_gives_back_a_smaller_module() -> None:
    rng = generator(0, "data")
    x, y = torch.randn(120, 6, generator=rng), torch.arange(120) % 3
    x[:, :3] += 3 * torch.nn.functional.one_hot(y, 3)
    clients = [fp.Client(i, str(i), fp.Examples(x[i::4], y[i::4])) for i in range(4)]
    result = fp.run(fp.fedsparse(lr=0.1, lambda_0=0.5, epochs=10), fp.models.mlp(6, (30, 20), 3), clients, rounds=10)
    small, whole = result.model(), result.objective.module(result.params)
    assert sum(p.numel() for p in small.parameters()) == result.parameters_left < result.parameters
    assert torch.allclose(small(x), whole(x), atol=1e-5)


def test_what_stays_dense() -> None:
    """Embeddings, recurrent layers, the residual stream under a LayerNorm, and the output layer."""
    vit, x = fp.models.vit(image=16, patch=4, width=12, heads=3, depth=1, hidden=20), torch.zeros(1, 1, 16, 16)
    groups = structure.groups(vit, x)
    assert {g.name.rpartition(".")[2]: g.units for g in groups} == {"value": 3, "first": 20}
    dense = structure.dense_layers(vit, groups)
    assert {"patches", "head"} < set(dense) and not any("attention.query" in n or "first" in n for n in dense)
    text, x = fp.models.char_transformer(7, 5, 12, 3, 4, depth=1, hidden=10), torch.zeros(1, 5, dtype=torch.int64)
    groups = structure.groups(text, x)
    assert {g.name: g.units for g in groups} == {"blocks.0.attention.value": 3, "blocks.0.first": 10}
    whole = {"embedding", "positions", "blocks.0.norm1", "blocks.0.norm2", "norm", "head"}
    assert {m.name.rpartition(".")[0] for g in groups for m in g.members}.isdisjoint(whole)
    dense = {gru_net(): ["embedding.0", "embedding.1.2", "gru", "head.2"]}
    dense |= {CharLSTM(reads): ["embedding", "before.2", "lstm", "head.2"] for reads in READS}
    for model, whole in dense.items():
        assert structure.dense_layers(model, structure.groups(model, x)) == whole


def test_units_of_a_group_norm_are_whole_norm_groups() -> None:
    net = depthwise_net()
    assert [g.units for g in structure.groups(net, torch.zeros(1, 1, 8, 8))] == [3, 4]


class Fixed(nn.Module):
    """An image's values in a row of 5 x 36, whatever the convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(1, 5, 3), nn.Linear(180, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.conv(x).relu().view(-1, 180)).relu())


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values, and two heads; a hidden layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.out, self.hidden, self.head = (nn.Linear(8, n) for n in (24, 8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.three(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.hidden(self.out(mixed).mean(1)).relu())


@pytest.mark.parametrize("name", MODELS)
def test_models_that_ask_their_layers_lose_any_unit(name: str) -> None:
    model, x, _, _ = setting(name)
    before = Objective(model).params()
    assert removable(model, x) == structure.groups(model, x)
    assert all(torch.equal(v, before[k]) for k, v in Objective(model).params().items())


TAKERS = {
    "fedsparse": lambda model, x: priors.SharedGates(0.5).bind(model, x),
    "fedsparse, a price": lambda model, x: priors.SpikeSlab(0.01).bind(model, x),
    "federated dropout": lambda model, x: priors.Dropout(0.5).bind(model, x),
    "group lasso": lambda model, x: priors.GroupLasso(0.1).bind(model, x),
    "pruning": lambda model, x: fp.prune(model, 0.5, x),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_width_in_the_forward_is_refused_before_anything_is_cut(taker: str) -> None:
    for model, layer, shape in ((Fixed(), "conv", (2, 1, 8, 8)), (Fused(), "three", (2, 5, 8))):
        with pytest.raises(ValueError, match=rf"'{layer}' cannot be removed: .* invalid for input.*write x.flatten"):
            TAKERS[taker](model, torch.zeros(shape))
