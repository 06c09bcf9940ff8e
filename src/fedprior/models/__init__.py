"""Small models for the examples, the command line and the benchmarks; rules and autoencoders in files of their own."""

from fedprior.models.elsa import ELSA, elsa
from fedprior.models.networks import (
    Attention,
    CharGRU,
    CharTransformer,
    ResidualBlock,
    TransformerBlock,
    ViT,
    char_gru,
    char_transformer,
    lenet,
    mlp,
    resnet,
    softmax,
    vit,
)
from fedprior.models.rules import Rules, Thresholds, rules

__all__ = [
    "ELSA",
    "Attention",
    "CharGRU",
    "CharTransformer",
    "ResidualBlock",
    "Rules",
    "Thresholds",
    "TransformerBlock",
    "ViT",
    "char_gru",
    "char_transformer",
    "elsa",
    "lenet",
    "mlp",
    "resnet",
    "rules",
    "softmax",
    "vit",
]
