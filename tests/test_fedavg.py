"""Gaussian prior + point posterior = FedAvg and FedProx, against a plain loop and a closed form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedprior as fp
from cases import classification_clients, close, equal, redraw
from fedprior import Client, Examples, cohort, inference, priors
from fedprior.codecs import Dense
from fedprior.rng import generator


def mcmahan(
    model: nn.Module,
    clients: Sequence[Client],
    rounds: int,
    per_round: int,
    lr: float,
    epochs: int,
    batch: int,
    weighting,
) -> nn.Module:
    """McMahan et al. 2017, Algorithm 1, without anything of fedprior but its names for randomness."""
    server = copy.deepcopy(model)
    for number in range(1, rounds + 1):
        states, weights = [], []
        for index in cohort.sample(0, number, len(clients), per_round):
            data, rng = clients[index].train, generator(0, number, index, "e_step")
            torch.randint(2**62, (), generator=rng)  # the run lends dropout layers a seed from the same generator
            local = copy.deepcopy(server).train()
            optimizer = torch.optim.SGD(local.parameters(), lr=lr)
            for _ in range(epochs):
                for rows in torch.randperm(len(data), generator=rng).split(batch):
                    optimizer.zero_grad()
                    F.cross_entropy(local(data.x[rows]), data.y[rows]).backward()
                    optimizer.step()
            states.append(local.state_dict())
            weights.append(float(len(data)) if weighting == "examples" else 1.0)
        mean = {}
        for name, value in server.state_dict().items():
            if value.is_floating_point():
                total = weights[0] * states[0][name]
                for weight, state in zip(weights[1:], states[1:], strict=True):
                    total = total + weight * state[name]
                mean[name] = total / sum(weights)
            else:
                mean[name] = value
        server.load_state_dict(mean)
    return server


@dataclass(frozen=True)
class Setting:
    name: str
    sizes: tuple[int, ...]
    cohort: int
    weighting: str
    epochs: int = 2
    batch_size: int = 4
    model: str = "mlp"


SETTINGS = [
    Setting("all-uniform", (8, 8, 8), 3, "uniform"),
    Setting("ragged-examples", (1, 5, 9, 14, 3), 5, "examples"),
    Setting("ragged-uniform", (1, 5, 9, 14, 3), 5, "uniform"),
    Setting("partial-examples", (7, 5, 9, 14, 3, 6), 3, "examples"),
    Setting("partial-uniform", (7, 5, 9, 14, 3, 6), 2, "uniform", epochs=1, batch_size=100),
    Setting("batch-norm", (8, 16, 12), 2, "examples", model="norm"),
]


def build(kind: str) -> nn.Module:
    if kind == "norm":
        return redraw(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    return fp.models.mlp(4, (6,), 3)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_fedavg_is_mcmahans_loop_bit_for_bit(setting: Setting) -> None:
    clients, model = classification_clients(setting.sizes), build(setting.model)
    algorithm = fp.fedavg(0.1, setting.epochs, setting.batch_size, setting.weighting)
    result = fp.run(algorithm, model, clients, rounds=4, cohort=setting.cohort, engine=fp.engines.Sequential())
    want = mcmahan(model, clients, 4, setting.cohort, 0.1, setting.epochs, setting.batch_size, setting.weighting)
    state = {k: v for k, v in want.state_dict().items() if v.is_floating_point()}
    assert equal({k: result.params[k] for k in state}, state)
    assert not close(state, {k: v for k, v in model.state_dict().items() if k in state}, 1e-3)
    assert equal({k: v for k, v in result.model().state_dict().items() if k in state}, state)


def test_weightings_differ() -> None:
    """Or the two weightings above would not be tested."""
    clients, model = classification_clients((1, 20, 3)), build("mlp")
    a, b = (fp.run(fp.fedavg(weighting=w), model, clients, rounds=1).params for w in ("examples", "uniform"))
    assert not close(a, b, 1e-4)


def test_fedprox_at_precision_0_is_fedavg() -> None:
    """Bit for bit at 0, and in the limit towards 0: no jump between the two."""
    clients, model = classification_clients((4, 9, 6)), build("mlp")

    def params(algorithm: fp.Algorithm) -> fp.Params:
        return fp.run(algorithm, model, clients, rounds=3, cohort=2).params

    fedavg = params(fp.fedavg(0.1, 2, 4))
    assert equal(params(fp.fedprox(0.1, precision=0.0, epochs=2, batch_size=4)), fedavg)
    assert close(params(fp.fedprox(0.1, precision=1e-7, epochs=2, batch_size=4)), fedavg, 1e-5)
    assert not close(params(fp.fedprox(0.1, precision=3.0, epochs=2, batch_size=4)), fedavg, 1e-2)


def ridge_client(index: int, examples: int) -> Client:
    rng = generator(index, "ridge")
    x, phi = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (examples, 1))
    y = x @ phi.T + 0.3 * torch.randn(examples, 1, generator=rng, dtype=torch.float64)
    return Client(index, f"client-{index}", Examples(x, y))


def ridge(client: Client, w: torch.Tensor, lam: float) -> torch.Tensor:
    """argmax_phi of -(1/2) |y - X phi|^2 - (lam/2) |phi - w|^2: sums over the examples, not means."""
    x, y = client.train.x, client.train.y
    return torch.linalg.solve(x.T @ x + lam * torch.eye(3, dtype=torch.float64), x.T @ y + lam * w.T).T


@pytest.mark.parametrize("lam", [1.0, 40.0])
@pytest.mark.parametrize("sizes", [(8, 8), (6, 30)], ids=["even", "ragged"])
def test_fedprox_client_finds_the_ridge_solution(lam: float, sizes: tuple[int, int]) -> None:
    """This pins the balance of likelihood and prior: precision is per data set, whatever its size."""
    clients, model = [ridge_client(i, n) for i, n in enumerate(sizes)], redraw(nn.Linear(3, 1, bias=False).double())
    w = model.weight.detach()
    algorithm = fp.Algorithm(
        priors.Gaussian(lam), inference.Point(step_size(clients, lam), 400, None), codec=Dense("float64")
    )
    result = fp.run(algorithm, model, clients, rounds=2, loss="regression")
    for _ in range(2):
        w = sum(ridge(c, w, lam) for c in clients) / len(clients)
    assert torch.allclose(result.params["weight"], w, rtol=0, atol=1e-9)


def step_size(clients: Sequence[Client], lam: float) -> float:
    """1 / the largest curvature of any client's objective per example: gradient ascent then converges."""
    largest = (torch.linalg.matrix_norm(c.train.x, 2) ** 2 + lam for c in clients)
    return 1 / float(max(value / len(c.train) for value, c in zip(largest, clients, strict=True)))


def test_precision_is_mu_times_examples() -> None:
    """FedProx's mu for a mean loss is precision / N_s: one full-batch step, by hand."""
    client, mu, lr = classification_clients((10,))[0], 0.3, 0.1
    model = build("mlp").double()
    client = Client(0, "c", Examples(client.train.x.double(), client.train.y))
    algorithm = fp.Algorithm(priors.Gaussian(mu * 10), inference.Point(lr, 3, None), codec=Dense("float64"))
    result = fp.run(algorithm, model, [client], rounds=1)
    local = copy.deepcopy(model)
    for _ in range(3):
        pull = sum(((p - w.detach()) ** 2).sum() for p, w in zip(local.parameters(), model.parameters(), strict=True))
        loss = F.cross_entropy(local(client.train.x), client.train.y) + mu / 2 * pull
        grads = torch.autograd.grad(loss, list(local.parameters()))
        with torch.no_grad():
            for p, g in zip(local.parameters(), grads, strict=True):
                p -= lr * g
    assert close(result.params, dict(local.named_parameters()), 1e-12)


SERVERS = [fp.server.Momentum(2.0, 0.9), fp.server.Adam(0.5), fp.server.Damped(1.7), fp.server.Yogi(0.5)]


@pytest.mark.parametrize("server", SERVERS, ids=lambda s: type(s).__name__)
def test_running_means_are_averaged_and_not_overshot(server) -> None:
    """Whatever the server step, batch norm's buffers are the mean of the clients' buffers."""
    clients, model = classification_clients((8, 16, 12)), build("norm")
    point = inference.Point(0.1, 1, 4)
    result = fp.run(fp.Algorithm(priors.Gaussian(), point, server, weighting="examples"), model, clients, rounds=1)
    exact = mcmahan(model, clients, 1, 3, 0.1, 1, 4, "examples").state_dict()
    buffers = ("1.running_mean", "1.running_var")
    assert all(torch.equal(result.params[k], exact[k]) for k in buffers)
    assert not close({"w": result.params["0.weight"]}, {"w": exact["0.weight"]}, 1e-3)
    assert all((result.params[k] != model.state_dict()[k]).all() for k in buffers)


def test_the_given_model_and_its_mode_are_left_alone() -> None:
    clients, model = classification_clients((8, 6)), build("norm").eval()
    before = copy.deepcopy(model.state_dict())
    fp.run(fp.fedavg(), model, clients, rounds=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())
