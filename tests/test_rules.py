"""FedNSL: rules by plain loops, posteriors by enumeration, EM on the exact objective, planted and real rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedprior as fp
from cases import close
from fedprior import Client, Examples, inference, posteriors, priors, wire
from fedprior.codecs import Dense
from fedprior.objective import Objective
from fedprior.rng import generator

INPUTS = 3


def model(inputs: int = INPUTS, classes: int = 2, length: int = 2) -> Any:
    """Rules in float64 whose scorer and rule distribution are nothing special."""
    made = fp.models.rules(inputs, classes, length, threshold=0.1, sharpness=3.0).double()
    rng = generator(0, "rules")
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
        made.rule.copy_(made.rule.softmax(1))
    return made


def clients(
    sizes: Sequence[int] = (9, 14, 11), noise: float = 0.1, held: int = 0, inputs: int = INPUTS
) -> list[Client]:
    """1 if x2 > 0 for odd clients, 1 if x0 > 0 and x1 < 0 for the others; then the noise turns answers over."""
    rng, found = generator(0, "clients"), []
    for index, size in enumerate(sizes):
        x = torch.randn(size + held, inputs, generator=rng, dtype=torch.float64)
        y = (x[:, 2] > 0) if index % 2 else (x[:, 0] > 0) & (x[:, 1] < 0)
        y = (y ^ (torch.rand(size + held, generator=rng) < noise)).long()
        parts = (Examples(x[rows], y[rows]) for rows in (slice(size), slice(size, None)))
        found.append(Client(index, f"client-{index}", *parts))
    return found


CLIENTS = clients()


def sigma(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def truth(made: Any, z: Tensor, x: Tensor) -> float:
    """Of the conjunction of the literals in z."""
    value = 1.0
    for literal in set(z.tolist()):
        j, negated = literal % len(x), literal >= len(x)
        b = sigma(float((made.predicates.sharpness[j] * (x[j] - made.predicates.threshold[j])).detach()))
        value *= 1 - b if negated else b
    return value


def yes(made: Any, z: Tensor, x: Tensor, c: int) -> float:
    """p(y = c | x, z)."""
    tau = truth(made, z, x)
    return tau * sigma(float(made.hit.detach()[c])) + (1 - tau) * sigma(float(made.miss.detach()[c]))


def bound(made: nn.Module, **fields: Any) -> tuple[Objective, Any, Any]:
    """Objective, prior and first eta of fednsl."""
    objective = Objective(made)
    prior = fp.fednsl(**fields).bind(made, CLIENTS[0].train.x).prior
    return objective, prior, prior.init(objective.params())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_outputs_are_the_log_odds_of_all_rules_together(length: int) -> None:
    made, x = model(length=length), CLIENTS[0].train.x[:4]
    bodies = {tuple(sorted(z)) for z in product(range(2 * INPUTS), repeat=length)}
    assert sorted(map(tuple, made.bodies.tolist())) == sorted(bodies)
    for row, logits in zip(x, made(x).detach(), strict=True):
        for c in range(2):
            p = sum(float(w) * yes(made, z, row, c) for w, z in zip(made.rule[c], made.bodies, strict=True))
            assert float(logits[c]) == pytest.approx(math.log(p / (1 - p)), abs=1e-9)


def test_the_softmax_is_the_law_of_the_answers_if_one_is_yes() -> None:
    made = model(classes=3)
    logits = made(CLIENTS[0].train.x[:1])[0].detach()
    p = logits.sigmoid()
    answers = {
        a: math.prod(float(v if yes else 1 - v) for v, yes in zip(p, a, strict=True)) for a in product((0, 1), repeat=3)
    }
    one = [answers[tuple(int(k == c) for k in range(3))] for c in range(3)]
    assert logits.softmax(0).tolist() == pytest.approx([v / sum(one) for v in one], abs=1e-9)


def test_log_lik_is_that_of_each_body() -> None:
    made, data = model(), CLIENTS[0].train
    got = made.log_lik(data.x, data.y).detach()
    for i, (row, y) in enumerate(zip(data.x, data.y.tolist(), strict=True)):
        for c, r in product(range(2), range(len(made.bodies))):
            p = yes(made, made.bodies[r], row, c)
            assert float(got[i, c, r]) == pytest.approx(math.log(p if y == c else 1 - p), abs=1e-9)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_generator_is_that_of_literals_drawn_one_by_one(length: int) -> None:
    """p(z) is the sum over all ordered draws that make z, and sums to 1."""
    made = model(length=length)
    prior = priors.Rules().bind(made, CLIENTS[0].train.x)
    theta = torch.randn(2, 2 * INPUTS, generator=generator(0, "theta"), dtype=torch.float64).softmax(1)
    got = prior.point(prior.Eta({"rule": theta}))["rule"]
    for c in range(2):
        want: dict[tuple[int, ...], float] = {}
        for draws in product(range(2 * INPUTS), repeat=length):
            z = tuple(sorted(draws))
            want[z] = want.get(z, 0.0) + math.prod(float(theta[c, i]) for i in draws)
        assert sum(want.values()) == pytest.approx(1)
        assert got[c].tolist() == pytest.approx([want[tuple(z)] for z in made.bodies.tolist()], abs=1e-12)


@pytest.mark.parametrize("pull", [0.0, 1.5])
def test_q_is_the_posterior_over_all_pairs_of_rules(pull: float) -> None:
    """p(z_0) p(z_1) prod_i (p([y_i = 0] | x_i, z_0) p([y_i = 1] | x_i, z_1))^(1 / temper), and its marginals."""
    made, few = model(), Client(0, "few", CLIENTS[0].train.take(torch.arange(4)))
    objective, prior, eta = bound(made, pull=pull)
    theta = torch.randn(2, 2 * INPUTS, generator=generator(0, "theta"), dtype=torch.float64).softmax(1)
    eta = eta._replace(part0_theta={"rule": theta})
    p = prior.point(eta)["rule"]
    e_step = inference.Rules(1e-9, 1, None, pull)
    q, state = e_step.e_step(objective, prior, eta, few, None, generator(0, "e_step"))
    likelihood = [
        [
            math.prod(
                abs(yes(made, z, x, c) - (y != c)) for x, y in zip(few.train.x, few.train.y.tolist(), strict=True)
            )
            for z in made.bodies
        ]
        for c in range(2)
    ]
    joint = torch.zeros(len(made.bodies), len(made.bodies), dtype=torch.float64)
    for a, b in product(range(len(made.bodies)), repeat=2):
        joint[a, b] = p[0, a] * p[1, b] * (likelihood[0][a] * likelihood[1][b]) ** (1 / (1 + pull))
    joint /= joint.sum()
    assert state is None
    assert torch.allclose(q.phi["rule"], torch.stack([joint.sum(1), joint.sum(0)]), rtol=1e-9, atol=0)


def test_the_scorer_takes_a_step_of_sgd_on_the_expected_log_likelihood() -> None:
    """w + lr / N_s grad sum_c E_q[score_c], for one step with all examples; the rule distribution has no gradient."""
    made, data = model(), CLIENTS[0].train
    objective, prior, eta = bound(made)
    q, _ = inference.Rules(0.1, 1, None).e_step(objective, prior, eta, CLIENTS[0], None, generator(0, "e_step"))
    value = (q.phi["rule"] * made.log_lik(data.x, data.y).sum(0)).sum() / len(data)
    trained = {k: v for k, v in made.named_parameters() if k != "rule"}
    steps = torch.autograd.grad(value, list(trained.values()))
    for (name, w), step in zip(trained.items(), steps, strict=True):
        assert bool(step.any()) and torch.allclose(q.phi[name], w + 0.1 * step, rtol=1e-9, atol=0), name


def test_the_m_step_is_relative_counts_and_only_counts_travel() -> None:
    made = model()
    _, prior, eta = bound(made, smooth=0.5)
    rules = [
        torch.randn(2, len(made.bodies), generator=generator(s, "q"), dtype=torch.float64).softmax(1) for s in range(3)
    ]
    counts = torch.zeros(2, 2 * INPUTS, dtype=torch.float64)
    for q in rules:
        for c, (r, z) in product(range(2), enumerate(made.bodies.tolist())):
            for literal in z:
                counts[c, literal] += float(q[c, r])
    messages = [prior.message(eta, posteriors.Point({**Objective(made).params(), "rule": q})) for q in rules]
    assert {k: tuple(v["rule"].shape) for k, v in messages[0].terms.items()} == {"part0_literals": (2, 2 * INPUTS)}
    new = prior.m_step(eta, messages[0] + messages[1] + messages[2])
    want = (counts + 0.5 * 2 / (2 * INPUTS)) / (2 * 3.5)
    assert close(new.part0_theta, {"rule": want}) and torch.allclose(want.sum(1), torch.ones(2).double())


def test_a_gaussian_in_its_place_sends_the_histogram() -> None:
    """Its M-step, the mean of the clients' q, is the categorical distribution over all rules that fits them best."""
    made = model()
    flat = replace(fp.fednsl(), prior=priors.Split({"rule": priors.Gaussian(), "*": priors.Personal()}))
    result = run(flat, made, 1)
    want = []
    for client in CLIENTS:
        objective, prior = Objective(made), flat.bind(made, client.train.x).prior
        q, _ = flat.inference.e_step(objective, prior, prior.init(objective.params()), client, None, generator(0))
        want.append(q.phi["rule"])
    assert torch.allclose(result.params["rule"], torch.stack(want).mean(0), rtol=1e-9, atol=1e-12)


def run(algorithm: fp.Algorithm, made: nn.Module, rounds: int, population: Any = CLIENTS, **more: Any) -> fp.Result:
    """In float64, on the wire as well."""
    return fp.run(replace(algorithm, codec=Dense("float64")), made, population, rounds=rounds, progress=False, **more)


def objective_value(result: fp.Result, made: Any, pull: float, smooth: float) -> float:
    """sum_s sum_c temper log sum_z p(z) exp(score_cz / temper) + temper log_hyper, by loops."""
    theta, temper, value = result.eta.part0_theta["rule"], 1 + pull, 0.0
    orders = [math.factorial(2) if z[0] != z[1] else 1 for z in made.bodies.tolist()]
    p = [[h * float(theta[c, z].prod()) for h, z in zip(orders, made.bodies, strict=True)] for c in range(2)]
    for client in CLIENTS:
        kept = wire.part(result.store.load(client.index), "kept", "cpu") or {}
        scorer = Objective(made).module({**kept, "rule": made.rule})
        for c, row in enumerate(p):
            score = scorer.log_lik(client.train.x, client.train.y).detach()[:, c].sum(0)  # type: ignore
            value += temper * math.log(sum(w * math.exp(float(s) / temper) for w, s in zip(row, score, strict=True)))
    return value + temper * smooth * 2 * float(theta.log().mean(1).sum())


@pytest.mark.parametrize(("pull", "smooth"), [(0.0, 1.0), (1.5, 0.3)])
def test_em_never_lowers_the_exact_objective(pull: float, smooth: float) -> None:
    made = model()
    algorithm = fp.fednsl(0.05, pull, smooth, batch_size=None)
    values = [objective_value(run(algorithm, made, rounds), made, pull, smooth) for rounds in range(1, 7)]
    assert all(b > a for a, b in pairwise(values)), values


def test_planted_rules_are_found_and_each_client_has_its_own() -> None:
    population = clients((80,) * 6, noise=0.05, held=60, inputs=5)
    made = fp.models.rules(5).double()
    result = run(fp.fednsl(0.1, pull=0.0), made, 12, population)
    for client in population:
        (own,) = result.personal(client).models
        said = Objective(made).module(own).say(["a", "b", "c", "d", "e"])  # type: ignore
        want = "1 if c  (" if client.index % 2 else "1 if a and not b  ("
        assert said[1].startswith(want), said
        assert float(said[1].split("(")[1][:-1]) > 0.5
    rows = result.personalised(population)
    for client, row in zip(population, rows, strict=True):
        assert float(row["after_accuracy"]) > best_single(client.held_out) - 0.1 * (client.index % 2), row
    likely = result.eta.part0_theta["rule"][1].topk(3).indices
    assert set(likely.tolist()) == {0, 2, 5 + 1}  # x0, x2, not x1


def best_single(data: Any) -> float:
    """Accuracy of the best "x_j > 0 or not" with a class for each answer, found with hindsight."""
    above = data.x > 0
    counts = torch.stack(
        [torch.stack([(above == side)[data.y == c].sum(0) for c in data.y.unique()]) for side in (False, True)]
    )
    return float(counts.max(1).values.sum(0).max()) / len(data)


def wine() -> tuple[Examples, Examples]:
    """178 wines of three growers, 13 measured quantities in units of their spread; every fourth is test."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_wine(return_X_y=True)
    every = fp.data.from_arrays((x - x.mean(0)) / x.std(0), y)
    is_test = torch.arange(len(y)) % 4 == 3
    return every.take(~is_test), every.take(is_test)


def test_rules_of_real_wines_beat_any_single_threshold() -> None:
    """Clients with different slices of the growers."""
    train, test = wine()
    population = fp.data.dirichlet(train, clients=6, alpha=1.0, seed=0)
    result = fp.run(fp.fednsl(0.1), fp.models.rules(13, 3), population, rounds=15, test=test, progress=False)
    assert result.history[-1].metrics["accuracy"] > best_single(test) + 0.1


def test_thresholds_may_differ_and_texts_name_them() -> None:
    made: Any = fp.models.rules(2, 2, threshold=(0.5, -1.0))
    assert made.predicates.threshold.tolist() == [0.5, -1.0]
    made.rule.data[1] = torch.tensor([float(z == [0, 3]) for z in made.bodies.tolist()])
    assert made.say()[1] == "1 if x0 and not x1  (1.00)"
    assert [line.split("  ")[0] for line in made.say(["high", "wide"])[1:]] == ["1 if high and not wide"]


def test_noise_in_the_sums_leaves_probabilities() -> None:
    _, prior, eta = bound(model())
    noisy = prior.project(
        eta._replace(part0_theta={"rule": eta.part0_theta["rule"] - 0.2 * torch.eye(2, 2 * INPUTS)}), eta
    ).part0_theta["rule"]
    assert bool((noisy > 0).all()) and torch.allclose(noisy.sum(1), torch.ones(2).double())


def test_what_does_not_fit_is_refused() -> None:
    dense, shaped = fp.models.mlp(INPUTS, (4,), 2).double(), nn.Linear(INPUTS, 2).double()
    shaped.rule = nn.Parameter(torch.ones(2, 3).double())
    for wrong, message in ((dense, "no parameter is left for 'rule'"), (shaped, "Linear has no bodies")):
        with pytest.raises(ValueError, match=rf"{message}.*needs a model of rules: fedprior\.models\.rules"):
            run(fp.fednsl(), wrong, 1)
    with pytest.raises(TypeError, match="needs a model of rules, and this one has none"):
        run(fp.Algorithm(priors.Gaussian(), inference.Rules(0.1)), dense, 1)
    wrongs: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (fp.fednsl, {"pull": -1.0}, "pull must be finite"),
        (fp.fednsl, {"smooth": 0.0}, "smooth must be finite"),
        (fp.models.rules, {"inputs": 0}, "rules need inputs"),
        (fp.models.rules, {"inputs": 3, "sharpness": 0.0}, "rules need inputs"),
        (fp.models.rules, {"inputs": 3, "threshold": (1.0, 2.0)}, "one threshold for all 3 inputs"),
    ]
    for make, wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            make(**wrong)
