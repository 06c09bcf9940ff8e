r"""Rules as a model: for each class a conjunction of literals, of which nobody knows which.

    b_j(x) = sigma(g_j(x)),  1 - b_j(x)           truth of literal j and of its negation; g: any module
    tau_z(x) = prod_{l in z} b_l(x)               truth of body z: a conjunction of at most `length` literals
    p(y = c | x, z) = tau_z hit_c + (1 - tau_z) miss_c
    p_c(x) = sum_z rule_cz p(y = c | x, z)        rule_c: a distribution over all bodies, for class c
    outputs_c = log p_c / (1 - p_c)

Each class asks a question of its own, "c or not?". The softmax of the outputs is the law of the answers given that
exactly one of them is yes. A body is a multiset of `length` literals; what is said twice counts once, so that shorter
conjunctions are among them, and those that contradict themselves never hold.

    code           shape                    code     shape
    rule           (classes, bodies)        hit      (classes,)    log-odds
    bodies         (bodies, length) int64   miss     (classes,)    log-odds

`rule` is not trained by gradients: inference.Rules finds it. Literals 0 .. d - 1 are the predicates, d .. 2 d - 1 their
negations. Products as soft conjunctions are a t-norm (Hajek 1998). Ours: the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Thresholds(nn.Module):
    """Predicates "x_j > threshold_j": (n, ...) -> log-odds (n, inputs) of sharpness (x_j - threshold_j)."""

    def __init__(self, threshold: Tensor, sharpness: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)
        self.sharpness = nn.Parameter(torch.full_like(threshold, sharpness))

    def forward(self, x: Tensor) -> Tensor:
        """Positive where the predicate holds."""
        return self.sharpness * (x.flatten(1) - self.threshold)


class Rules(nn.Module):
    """A rule for each class.

    Args:
        predicates: inputs -> log-odds (n, count); its weights are the scorer's, as are `hit` and `miss`.
        count: of the predicates.
        classes: of the outputs.
        length: literals of a body.
    """

    bodies: Tensor
    _again: Tensor

    def __init__(self, predicates: nn.Module, count: int, classes: int, length: int) -> None:
        super().__init__()
        bodies = torch.tensor(list(combinations_with_replacement(range(2 * count), length)))
        self.predicates = predicates
        self.rule = nn.Parameter(torch.full((classes, len(bodies)), 1 / len(bodies)), requires_grad=False)
        self.hit, self.miss = (nn.Parameter(torch.full((classes,), odds)) for odds in (2.0, -2.0))
        self.register_buffer("bodies", bodies, persistent=False)
        self.register_buffer("_again", bodies == bodies.roll(1, 1).index_fill(1, torch.tensor(0), -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        yes, no = self._answers((self.truth(x) @ self.rule.T)[:, :, None])
        return (yes.log() - no.log()).squeeze(2)

    def log_lik(self, x: Tensor, y: Tensor) -> Tensor:
        """log p([y = c] | x, z) of every class and body, (n, classes, bodies), in nats."""
        yes, no = self._answers(self.truth(x)[:, None])
        return torch.where(F.one_hot(y, len(self.hit)).bool()[:, :, None], yes, no).log()

    def truth(self, x: Tensor) -> Tensor:
        """tau, (n, bodies)."""
        odds = self.predicates(x)
        literals = torch.cat([F.logsigmoid(odds), F.logsigmoid(-odds)], 1)
        return literals[:, self.bodies].masked_fill(self._again, 0.0).sum(2).exp()

    def _answers(self, holds: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities of yes and no where a body holds so much; (n, classes or 1, ...)."""
        hit, miss = self.hit[:, None], self.miss[:, None]
        fails = (1 - holds).clamp(min=0)  # a sum of probabilities may be 1 and a rounding error
        yes, no = (holds * (s * hit).sigmoid() + fails * (s * miss).sigmoid() for s in (1, -1))
        return yes, no

    @torch.no_grad()
    def say(self, names: Sequence[str] | None = None, top: int = 1) -> list[str]:
        """The `top` rules of each class, as text.

        Args:
            names: of the predicates; None for x0, x1, ...
            top: how many.
        """
        count = int(self.bodies.max() + 1) // 2
        names = [f"x{j}" for j in range(count)] if names is None else names
        literals = [*names, *(f"not {name}" for name in names)]
        lines = []
        for label, rule in enumerate(self.rule):
            for z in rule.argsort(descending=True)[:top].tolist():
                body = " and ".join(literals[i] for i in dict.fromkeys(self.bodies[z].tolist()))
                lines.append(f"{label} if {body}  ({float(rule[z]):.2f})")
        return lines


def rules(
    inputs: int,
    classes: int = 2,
    length: int = 2,
    threshold: float | tuple[float, ...] = 0.0,
    sharpness: float = 5.0,
) -> nn.Module:
    """Rules over the predicates "x_j > threshold_j", all equally likely at first; (n, ...) is flattened to (n, inputs).

    Args:
        inputs: how many.
        classes: of the outputs.
        length: literals of a rule: there are (2 inputs + length - 1 over length) bodies for each class.
        threshold: one for all inputs, or one each.
        sharpness: of the soft threshold, per unit of x; > 0.
    """
    if min(inputs, classes, length) < 1 or not sharpness > 0:
        raise ValueError(
            f"rules need inputs, classes and length of at least 1 and sharpness > 0, got {inputs=}, {classes=}, "
            f"{length=}, {sharpness=}"
        )
    first = torch.tensor(threshold, dtype=torch.float32)
    if first.numel() not in (1, inputs):
        raise ValueError(f"rules need one threshold for all {inputs} inputs or one each, got {first.numel()}")
    return Rules(Thresholds(first.expand(inputs).clone(), sharpness), inputs, classes, length)
