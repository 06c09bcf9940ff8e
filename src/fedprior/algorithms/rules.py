"""Rules in the place of weights: what travels is their distribution."""

from __future__ import annotations

from fedprior import inference, priors
from fedprior.algorithm import Algorithm, Weighting


def fednsl(
    lr: float = 0.05,
    pull: float = 1.0,
    smooth: float = 1.0,
    epochs: int = 1,
    batch_size: int | None = 20,
    weighting: Weighting = "uniform",
) -> Algorithm:
    """Xing et al. 2024, arXiv:2308.15324: clients infer which rules hold for them; only rules' probabilities travel.

    For a model of rules, models.rules(...), whose weights stay with the client. `pull` holds clients' rules together
    (inference.Rules), `smooth` keeps all rules possible (priors.Rules). Of the paper's type; model and losses are ours.
    """
    prior = priors.Split({"rule": priors.Rules(smooth), "*": priors.Personal()})
    return Algorithm(prior, inference.Rules(lr, epochs, batch_size, pull), weighting=weighting, name="fednsl")
