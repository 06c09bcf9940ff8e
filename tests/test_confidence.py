"""pFedVEM: a client's rho in closed form, its mean-field head, both phases by hand, and heads by confidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
import quadratics
from cases import classification_clients, close
from fedprior import Client, Examples, Params, inference, posteriors, priors
from fedprior.codecs import Dense
from fedprior.objective import Objective
from fedprior.rng import generator
from laws import caught

HEAD, BASE = 3, 2


class Sum(nn.Module):
    """x -> <psi, x[:2]> + <phi, x[2:]>: a base and a head whose posteriors have closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(BASE, 1, bias=False)
        self.head = nn.Linear(HEAD, 1, bias=False)
        nn.init.constant_(self.base.weight, -0.5)
        nn.init.constant_(self.head.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x[:, :BASE]) + self.head(x[:, BASE:])


MODEL = Sum().double()
OBJECTIVE = Objective(MODEL, "regression")


def made(index: int, size: int, far: float = 2.0) -> Client:
    """A client whose head lies about `far` from 0."""
    rng = generator(index, "confidence")
    x = torch.randn(size, BASE + HEAD, generator=rng, dtype=torch.float64)
    phi = torch.cat([torch.ones(BASE, 1).double(), far * torch.randn(HEAD, 1, generator=rng, dtype=torch.float64)])
    y = x @ phi + 0.3 * torch.randn(size, 1, generator=rng, dtype=torch.float64)
    return Client(index, f"client-{index}", Examples(x, y))


CLIENTS = [made(0, 12), made(1, 16), made(2, 24)]
CLIENT = CLIENTS[0]
PRIOR = priors.Confidence(0.5).bind(MODEL, CLIENT.train.x)
ETA = PRIOR.init(OBJECTIVE.params())
MU = torch.full((HEAD,), 0.5, dtype=torch.float64)
STATE: Params = {
    "m/head.weight": torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64),
    "var/head.weight": torch.tensor([[0.2, 0.1, 0.4]], dtype=torch.float64),
}


def precision_of(m: Tensor, var: Tensor, mu: Tensor) -> float:
    """1 / rho^2, by a plain loop."""
    return len(m) / sum(float((a - b) ** 2 + v) for a, b, v in zip(m, mu, var, strict=True))


def trained(e_step: inference.Confidence, state: Params | None, seed: int = 0) -> tuple[posteriors.Confident, Params]:
    return e_step.e_step(OBJECTIVE, PRIOR, ETA, CLIENT, state, generator(seed, "e_step"))


def test_confidence_is_the_best_rho_and_reads_the_server_s_mean() -> None:
    """d log_prob / d rho = 0 there, and the closed form by a plain loop; 1 for a client never seen."""
    q, _ = trained(inference.Confidence(1e-9, 1), STATE)
    c = float(q.confidence["c"])
    m, var = STATE["m/head.weight"][0], STATE["var/head.weight"][0]
    assert c == pytest.approx(PRIOR.rho**2 * precision_of(m, var, MU), rel=1e-12)
    leaf = q.confidence["c"].clone().requires_grad_()
    before = replace(q, phi=q.phi | {"head.weight": m[None]}, var={"head.weight": var[None]}, confidence={"c": leaf})
    PRIOR.log_prob(ETA, PRIOR.stats(before)).backward()
    assert leaf.grad is not None and abs(float(leaf.grad)) < 1e-12
    new, _ = trained(inference.Confidence(0.1), None)
    assert float(new.confidence["c"]) == pytest.approx(1, rel=1e-12)


def test_log_prob_is_the_density() -> None:
    """E log N(phi; mu, rho^2) summed over the head's entries, up to the constant and to the unit of c."""
    q, _ = trained(inference.Confidence(0.1), STATE)
    rho = PRIOR.rho / float(q.confidence["c"]) ** 0.5
    m, var = q.phi["head.weight"][0], q.var["head.weight"][0]
    value = sum(float(-0.5 * ((a - b) ** 2 + v) / rho**2) for a, b, v in zip(m, MU, var, strict=True))
    want = value - HEAD * math.log(rho / PRIOR.rho)
    assert float(PRIOR.log_prob(ETA, PRIOR.stats(q))) == pytest.approx(want, rel=1e-9)


def test_the_head_ends_at_its_mean_field_posterior() -> None:
    """With the base where it is: precision N x'x + 1 / rho^2. Small steps, whose noise is far below the widths."""
    e_step = inference.Confidence(0.1, 1, None, head_epochs=200)
    q, state = trained(e_step, STATE)
    x, y = CLIENT.train.x, CLIENT.train.y[:, 0]
    for lr in (0.02, 0.004):
        held = replace(e_step, lr=lr, head_epochs=800)
        psi = ETA.mean["base.weight"][0]
        q, after = trained(held, state, seed=1)
        c = precision_of(state["m/head.weight"][0], state["var/head.weight"][0], MU)
        state = after
    h = x[:, BASE:].T @ x[:, BASE:]
    m = torch.linalg.solve(
        h + c * torch.eye(HEAD, dtype=torch.float64), x[:, BASE:].T @ (y - x[:, :BASE] @ psi) + c * MU
    )
    precision = h.diagonal() + c
    assert ((q.phi["head.weight"][0] - m) * precision.sqrt()).abs().max() < 0.3
    assert (q.var["head.weight"][0] * precision).log().abs().max() < 0.2


def by_hand(state: Params, lr: float, head_steps: int, base_steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """m, sigma and psi after both phases on full batches: gradients in closed form, with the same draws."""
    rng, n = generator(seed, "e_step"), len(CLIENT.train)
    x, y = CLIENT.train.x, CLIENT.train.y[:, 0]
    m, wide = state["m/head.weight"][0].clone(), 0.5 * state["var/head.weight"][0].log()
    psi, c = torch.full((BASE,), -0.5, dtype=torch.float64), precision_of(m, (2 * wide).exp(), MU)
    for steps, of_head in ((head_steps, True), (base_steps, False)):
        torch.randint(2**62, (), generator=rng)
        for _ in range(steps):
            torch.randperm(n, generator=rng)
            e = torch.randn(1, HEAD, generator=rng, dtype=torch.float64)[0]
            s = wide.exp()
            residual = y - x[:, :BASE] @ psi - x[:, BASE:] @ (m + s * e)
            slope = x[:, BASE:].T @ residual / n
            if of_head:
                m, wide = m + lr * (slope - c * (m - MU) / n), wide + lr * (slope * s * e + (1 - c * s**2) / n)
            else:
                psi = psi + lr * x[:, :BASE].T @ residual / n
    return m, wide.exp(), psi


def test_both_phases_by_hand() -> None:
    """Two steps of the head with the base held, then three of the base with q held; the head's draws go on."""
    q, state = trained(inference.Confidence(0.1, 3, None, head_epochs=2), STATE)
    m, s, psi = by_hand(STATE, 0.1, 2, 3)
    assert torch.allclose(q.phi["head.weight"][0], m, rtol=1e-9, atol=1e-9)
    assert torch.allclose(q.var["head.weight"][0], s**2, rtol=1e-9, atol=1e-9)
    assert torch.allclose(q.phi["base.weight"][0], psi, rtol=1e-9, atol=1e-9)
    assert close(state, {"m/head.weight": q.phi["head.weight"], "var/head.weight": q.var["head.weight"]}, 1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_server_trusts_heads_by_confidence_and_bases_by_number(weighting: Any) -> None:
    """Round 2 of a run: c_s from what round 1 left and round 1's mu, in float64 on the wire."""
    algorithm = replace(fp.pfedvem(0.1, 0.5, batch_size=None, weighting=weighting), codec=Dense("float64"))

    def after(rounds: int) -> fp.Result:
        return fp.run(algorithm, MODEL, CLIENTS, rounds=rounds, loss="regression", seed=3)

    first, second = after(1), after(2)
    mu = first.params["head.weight"][0]
    top, bottom, psi, count = torch.zeros(HEAD).double(), 0.0, torch.zeros(BASE).double(), 0.0
    confident = []
    for client in CLIENTS:
        left = first.store.load(client.index) or {}
        now = {k.removeprefix("e_step/"): v for k, v in (second.store.load(client.index) or {}).items()}
        own = {k.removeprefix("e_step/"): v for k, v in left.items()}
        weight = float(len(client.train)) if weighting == "examples" else 1.0
        c = precision_of(own["m/head.weight"][0], own["var/head.weight"][0], mu)
        confident.append(c)
        top, bottom = top + weight * c * now["m/head.weight"][0], bottom + weight * c
        prior = algorithm.bind(MODEL, client.train.x).prior
        rng = generator(3, 2, client.index, "e_step")
        q, _ = algorithm.inference.e_step(OBJECTIVE, prior, first.eta, client, own, rng)
        psi, count = psi + weight * q.mean()["base.weight"][0], count + weight
    assert torch.allclose(second.params["head.weight"][0], top / bottom, rtol=1e-9, atol=1e-9)
    assert torch.allclose(second.params["base.weight"][0], psi / count, rtol=1e-9, atol=1e-9)
    assert max(confident) > 1.2 * min(confident)


def test_a_client_far_from_the_others_counts_for_less() -> None:
    """Its head is ten times as far: the server's head is nearer to the others' mean than FedAvg's."""
    clients = [*(made(index, 24, 0.3) for index in range(3)), made(3, 24, 10.0)]
    own = [torch.linalg.lstsq(c.train.x, c.train.y).solution[BASE:, 0] for c in clients]
    others = torch.stack(own[:3]).mean(0)
    found = {}
    for algorithm in (fp.pfedvem(0.1, weighting="uniform"), fp.fedper(0.1), fp.fedavg(0.1, weighting="uniform")):
        result = fp.run(algorithm, MODEL, clients, rounds=30, loss="regression")
        found[algorithm.name] = float((result.params["head.weight"][0] - others).norm())
    assert found["pfedvem"] < 0.3 * found["fedavg"]


def test_personal_predictions_are_draws_of_the_clients_own_head() -> None:
    """Their mean and variance are those of q, within 5 deviations of 4000 draws; the base is one."""
    algorithm = replace(fp.pfedvem(0.1), inference=inference.Confidence(0.1, draws=4000))
    result = fp.run(algorithm, MODEL, CLIENTS, rounds=2, loss="regression")
    state = {k.removeprefix("e_step/"): v for k, v in (result.store.load(0) or {}).items()}
    q, _ = result.algorithm.inference.e_step(
        result.objective, result.algorithm.prior, result.eta, CLIENT, state, generator(0, 0, "personal")
    )
    own = result.personal(CLIENT).models
    heads, sd = torch.stack([model["head.weight"][0] for model in own]), q.var["head.weight"][0].sqrt()
    assert len(own) == 4000 and all(torch.equal(model["base.weight"], q.phi["base.weight"]) for model in own)
    assert ((heads.mean(0) - q.phi["head.weight"][0]) / sd).abs().max() < 5 / 4000**0.5
    assert (heads.std(0) / sd - 1).abs().max() < 5 / (2 * 4000) ** 0.5


def test_a_model_that_is_all_head() -> None:
    """Nothing is shared but mu: one layer, and no base to train."""
    result = quadratics.run(fp.pfedvem(0.1), quadratics.clients(), 2)
    assert set(result.params) == {"weight"} and bool(result.params["weight"].isfinite().all())


def test_deltas_are_of_heads_and_bases() -> None:
    """c (m - mu) and psi_s - psi: what int8 rounds is 0 for a client that did not move."""
    algorithm = replace(fp.pfedvem(0.1), delta=True)
    q = posteriors.Confident(ETA.mean, {"head.weight": torch.ones(1, HEAD).double()}, {"c": torch.tensor(3.0).double()})
    sent = PRIOR.stats(q).only(PRIOR.uplink).weighted(2.5)
    reference = replace(algorithm, prior=PRIOR).reference(ETA, sent)
    assert set(reference.terms) == {"conf_phi", "psi"} and reference.clients == 2.5
    for term, params in reference.terms.items():
        assert close(dict(params), dict(sent[term]), 1e-12)
    clients = classification_clients((14, 9, 11))
    plain, coarse = (
        fp.run(
            replace(fp.pfedvem(0.1), codec=Dense(kind), delta=kind == "int8"),
            fp.models.mlp(4, (6,), 3),
            clients,
            rounds=3,
        )
        for kind in ("float32", "int8")
    )
    assert coarse.bytes_up < 0.75 * plain.bytes_up and close(coarse.params, plain.params, 0.1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a client's own rho, and Point has none: use inference\.Confidence"):
        fp.run(fp.Algorithm(priors.Confidence(), inference.Point(0.1)), MODEL, CLIENTS, rounds=1, loss="regression")
    with pytest.raises(TypeError, match="Confidence needs a prior whose clients have a rho, and Gaussian has none"):
        fp.run(fp.Algorithm(priors.Gaussian(), inference.Confidence(0.1)), MODEL, CLIENTS, rounds=1, loss="regression")
    with pytest.raises(ValueError, match=r"head='fc\.\*' names no trained parameter; the model has base\.weight"):
        fp.run(fp.pfedvem(0.1, head="fc.*"), MODEL, CLIENTS, rounds=1, loss="regression")
    with pytest.raises(ValueError, match="need a finite rho > 0"):
        priors.Confidence(0.0)
    wrongs: list[dict[str, Any]] = [{"head_epochs": 0}, {"draws": 0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="need head_epochs >= 1"):
            inference.Confidence(0.1, **wrong)


def planted(f: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args: change(f(*args))


def terms(change: Callable[[Any], dict[str, Params]]) -> Callable[[Any], Any]:
    return lambda t: replace(t, terms={**t.terms, **change(t)})


MISTAKES: dict[str, tuple[Any, str, Callable[[Any], Any], Callable[[], None]]] = {
    "rho^2 without sigma": (
        priors.Confidence,
        "confidence",
        lambda f: lambda s, eta, q: f(s, eta, replace(q, var={k: 0 * v for k, v in q.var.items()})),
        test_confidence_is_the_best_rho_and_reads_the_server_s_mean,
    ),
    "rho for rho^2": (
        priors.Confidence,
        "confidence",
        lambda f: planted(f, lambda c: {"c": c["c"].sqrt()}),
        test_both_phases_by_hand,
    ),
    "mu as it was": (
        priors.Confidence,
        "confidence",
        lambda f: lambda s, eta, q: f(s, ETA, q),
        lambda: test_the_server_trusts_heads_by_confidence_and_bases_by_number("uniform"),
    ),
    "no -d log rho": (
        priors.Confidence,
        "stats",
        lambda f: planted(f, terms(lambda t: {"log_conf": {"c": 0 * t["conf"]["c"]}})),
        test_log_prob_is_the_density,
    ),
    "heads by number": (
        priors.Confidence,
        "confidence",
        lambda f: planted(f, lambda c: {"c": torch.ones_like(c["c"])}),
        test_a_client_far_from_the_others_counts_for_less,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_closed_forms_catch_the_mistake(mistake: str) -> None:
    caught(*MISTAKES[mistake])
