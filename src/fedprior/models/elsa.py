r"""ELSA: several autoencoders in one network, whose codes are put side by side.

    h_1 = x,   h_{k+1} = dec_k(enc_k(h_k)) if chained, else x
    z(x)  = [enc_1(h_1), ..., enc_K(h_K)]                the expanded code
    loss  = 1/2 sum_k |x - dec_k(enc_k(h_k))|^2          in nats per example: unit variance, without the constant

    outputs (n, K, inputs): the reconstructions dec_k(enc_k(h_k));   targets: the inputs (data.autoencoding)

Vilar de Oliveira, Pires Aragao, Garcia Goncalves 2024, "ELSA: Expanded Latent Space Autoencoder for Image Feature
Extraction and Classification", SciTePress 124553. In the paper, by its abstract [V]: more than one autoencoder, codes
put side by side, and a classifier trained on the codes afterwards. Unknown to us [?]: sizes, how many there are, what
the second one reads. Ours: dense layers with ReLU, the sum of the losses, `chained`, and the federation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedprior.models.networks import own_randomness, seeded


class ELSA(nn.Module):
    """Autoencoders side by side, or one after the other."""

    def __init__(self, inputs: int, hidden: int, code: int, autoencoders: int, chained: bool) -> None:
        super().__init__()
        self.chained = chained
        self.encoders = nn.ModuleList(_dense(inputs, hidden, code) for _ in range(autoencoders))
        self.decoders = nn.ModuleList(_dense(code, hidden, inputs) for _ in range(autoencoders))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions: (n, ...) -> (n, autoencoders, inputs)."""
        return torch.stack([decoded for _, decoded in self._each(x)], 1)

    def encode(self, x: Tensor) -> Tensor:
        """The expanded code: (n, ...) -> (n, autoencoders * code)."""
        return torch.cat([code for code, _ in self._each(x)], 1)

    def _each(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Codes and reconstructions."""
        h, pairs = x.flatten(1), []
        for encoder, decoder in zip(self.encoders, self.decoders, strict=True):
            code = encoder(h)
            decoded = decoder(code)
            pairs.append((code, decoded))
            h = decoded if self.chained else h
        return pairs


def _dense(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


@own_randomness
def elsa(
    inputs: int = 784,
    hidden: int = 200,
    code: int = 16,
    autoencoders: int = 2,
    chained: bool = False,
    seed: int = 0,
) -> ELSA:
    """An ELSA initialised from `seed`; (n, ...) is flattened to (n, inputs). Train it with loss="autoencoder".

    Args:
        inputs: numbers of an example.
        hidden: units between input and code, and between code and output.
        code: numbers of one autoencoder's code.
        autoencoders: how many.
        chained: let an autoencoder read the reconstruction of the one before, not the input.
        seed: of the initial weights.
    """
    if min(inputs, hidden, code, autoencoders) < 1:
        raise ValueError(f"elsa needs sizes of at least 1, got {inputs=}, {hidden=}, {code=}, {autoencoders=}")
    model = ELSA(inputs, hidden, code, autoencoders, chained)
    seeded(model, seed)
    return model
