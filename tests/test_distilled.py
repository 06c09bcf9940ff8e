"""Personal prior means, Langevin chains with students, models for few bits: closed forms and plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedprior as fp
import quadratics
from cases import classification_clients, close
from fedprior import inference, penalties, priors, rounding, tree, wire
from fedprior.objective import Objective
from fedprior.rng import generator

QUADRATIC = quadratics.clients()[0]
LINE = Objective(quadratics.model(), "regression")
H, BEST = quadratics.hessian(QUADRATIC), quadratics.optimum(QUADRATIC)


def vector(params: fp.Params) -> torch.Tensor:
    return params["weight"][0]


def bregman(strategy: str, state: fp.Params | None = None) -> tuple[torch.Tensor, fp.Params]:
    prior = priors.Gaussian()
    e_step = inference.Bregman(0.02, strategy, 15.0, 0.01, 0.3, 5, 2, None)  # type: ignore[arg-type]
    q, state = e_step.e_step(LINE, prior, prior.init(LINE.params()), QUADRATIC, state, generator(0, "bregman"))
    return vector(q.phi), state


@pytest.mark.parametrize("strategy", ["gradient", "memory"])
def test_prior_means_of_a_quadratic(strategy: str) -> None:
    """The loop of the module's docstring, with the gradient H (best - phi); two epochs of one batch."""
    w = vector(LINE.params())
    last, theta = w + 1, w - 2
    state = wire.join({"last": {"weight": last[None]}, "theta": {"weight": theta[None]}})
    for _ in range(2):
        s = w + 0.3 * H @ (BEST - w) if strategy == "gradient" else w - 0.3 * (last - theta)
        theta = s if strategy == "gradient" else w
        for _ in range(5):
            theta = theta + 0.02 * (H @ (BEST - theta) + 15 * (s - theta))
        w = w - 0.15 * (s - theta)
    got, after = bregman(strategy, state)
    assert torch.allclose(got, w, rtol=1e-9, atol=1e-9)
    assert torch.allclose(after["theta/weight"][0], theta, rtol=1e-9, atol=1e-9)
    assert torch.equal(after["last/weight"][0], got)


def test_without_memory_it_is_pfedme() -> None:
    prior = priors.Gaussian()
    arguments = LINE, prior, prior.init(LINE.params()), QUADRATIC, None
    one = inference.Bregman(0.02, "memory", 15.0, 0.01, 0.3, 5, 1, None).e_step(*arguments, generator(0, "one"))[0]
    other = inference.Moreau(0.02, 15.0, 0.01, 5, 1, None).e_step(*arguments, generator(0, "one"))[0]
    assert close(one.phi, other.phi, 1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_has_the_posteriors_moments(temperature: float) -> None:
    """Mean: the optimum. Covariance: temperature (N H (1 - lr H / 4))^-1, from x' = (1 - lr H / 2) x + noise."""
    chain, lr = inference.Langevin(0.5, 0.1, 6000, None, temperature, 0.0), 0.5
    start = {"weight": BEST[None].clone()}
    drawn = torch.stack([vector(s).clone() for s in chain.samples(LINE, start, QUADRATIC, generator(0, "chain"))])
    inverse = len(QUADRATIC.train) * H @ (torch.eye(len(H), dtype=H.dtype) - lr * H / 4)
    wanted = temperature * torch.linalg.inv(inverse)
    scale = wanted.diagonal().sqrt()
    assert ((drawn.mean(0) - BEST).abs() < 0.15 * scale).all()
    assert ((torch.cov(drawn.T) - wanted).abs() < 0.15 * scale.outer(scale)).all()


def test_a_student_learns_the_teachers_predictions() -> None:
    """A softmax regression: the loop with the slope (p - q) x', and descent on a convex mean KL.

    With step lr <= 1/L the KL falls in every step, and is at most |v_0 - teacher|^2 / (2 lr t) after t of them; here
    L <= max |(x, 1)|^2 / 2. The tolerance is that of the noise on x, of 1e-3.
    """
    client, model = classification_clients((60,))[0], Objective(fp.models.mlp(4, (), 3))
    rng, prior, x = generator(0, "student"), priors.Distilled(), client.train.x
    teacher = tree.map(lambda v: torch.randn(v.shape, generator=rng), model.params())
    weight, bias = teacher  # names
    lr = 1 / float((1 + x.square().sum(1)).max() / 2)
    p = (x @ teacher[weight].T + teacher[bias]).softmax(-1)

    def gap(v: fp.Params) -> float:
        return float((p * (p.log() - model.outputs(v, x).log_softmax(-1))).sum(-1).mean())

    student = model.params()
    start, gaps = student, [gap(student)]
    for steps in range(1, 6):
        e_step = inference.Langevin(1e-9, lr, steps, None, temperature=0.0)
        q, _ = e_step.e_step(model, prior, prior.Eta(teacher, start), client, None, rng)
        rest = (p - (x @ student[weight].T + student[bias]).softmax(-1)) / len(x)
        student = {weight: student[weight] + lr * rest.T @ x, bias: student[bias] + lr * rest.sum(0)}
        assert close(q.student, student, 5e-3) and close(q.phi, teacher, 1e-5)
        gaps.append(gap(q.student))
        distance = sum(float((teacher[k] - start[k]).square().sum()) for k in teacher)
        assert gaps[-1] <= distance / (2 * lr * steps)
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_rounded_values_lie_on_the_grid(bits: int) -> None:
    objective = Objective(fp.models.mlp(4, (40,), 3))
    phi, rounded = objective.params(), rounding.rounded(objective, objective.params(), bits)
    for name, value in phi.items():
        if value.ndim == 1:
            assert torch.equal(rounded[name], value)
            continue
        step = (value.max() - value.min()) / (2**bits - 1)
        assert len(rounded[name].round(decimals=5).unique()) <= 2**bits
        assert (rounded[name] - value).abs().max() <= 0.501 * step


def test_kurtosis_and_similarity() -> None:
    """A symmetric two-point law has kurtosis 1; three points -a, 0, a in equal parts have 3/2."""
    objective = Objective(nn.Linear(3, 2, bias=False))
    two, three = torch.tensor([[-1.0, 1, -1], [1, -1, 1]]), torch.tensor([[-2.0, 0, 2], [2, 0, -2]])
    kurtosis = penalties.Kurtosis(10.0)
    assert float(kurtosis(objective, {"weight": two})) == pytest.approx(10 * 0.8**2)
    assert float(kurtosis(objective, {"weight": three})) == pytest.approx(10 * 0.3**2, rel=1e-5)
    apart, aligned = torch.tensor([[2.0, 0, 0], [0, 3, 0]]), torch.tensor([[1.0, 1, 0], [-2, -2, 0]])
    similarity = penalties.Similarity(7.0)
    assert float(similarity(objective, {"weight": apart})) == pytest.approx(0, abs=1e-6)
    assert float(similarity(objective, {"weight": aligned})) == pytest.approx(7)


def test_rough_weights() -> None:
    """Noise is as wide as a step of the grid, rounding lands on it, and the slope passes through either."""
    objective = Objective(fp.models.mlp(50, (40,), 3))
    phi = {k: v.requires_grad_() for k, v in objective.params().items()}
    value = phi["1.weight"].detach()
    step = rounding.step_of(value, 3)
    for kind in ("noise", "rounding"):
        rough = inference.Rough(0.1, kind=kind, bits=(3,)).rough(objective, phi, generator(0, kind))["1.weight"]
        moved = (rough - value).detach() / step
        assert moved.abs().max() <= 0.501 and float(moved.var()) == pytest.approx(1 / 12, rel=0.15)
        (slope,) = torch.autograd.grad(rough.sum(), [phi["1.weight"]])
        assert torch.equal(slope, torch.ones_like(slope))
    target = rounding.rounded(objective, {k: v.detach() for k, v in phi.items()}, 3)["1.weight"]
    assert torch.allclose(rough, target, atol=1e-6)


def test_training_for_few_bits_helps_at_few_bits() -> None:
    """Digits at 2 bits: rounding in training keeps accuracy that FedAvg loses."""
    train, test = fp.data.load("digits")
    clients = fp.data.dirichlet(train, clients=10, alpha=1.0, seed=0)
    accuracy = {}
    for make in (fp.fedavg, fp.mqat):
        result = fp.run(make(lr=0.1), fp.models.mlp(64, (32,)), clients, rounds=15, progress=False)
        accuracy[make.__name__] = rounding.by_bits(result, test, (2,))[2]["accuracy"]
    assert accuracy["mqat"] > accuracy["fedavg"]
