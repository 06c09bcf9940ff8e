r"""Shamir's secret sharing: any `threshold` of the shares give the secret, fewer say nothing about it.

    f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1}   mod p,      a_k uniform,   share of x = f(x),   x = 1, 2, ...
    secret = f(0) = sum_i f(x_i) prod_{j != i} x_j / (x_j - x_i)   mod p      from any t different x_i

p = 2^256 + 297 is the least prime above 2^256, so that 32 bytes are a secret; a share has 33.
Shamir 1979, doi:10.1145/359168.359176.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES, COEFFICIENT_BYTES = 32, 33, 48


def split(secret: bytes, points: Sequence[int], threshold: int, noise: bytes) -> list[bytes]:
    """The shares at `points`.

    Args:
        secret: 32 bytes.
        points: different whole numbers between 1 and 2^32, one a holder.
        threshold: how many shares give the secret back.
        noise: threshold - 1 times 48 uniform bytes, used once: 128 bits more than p has, so that mod p is uniform.
    """
    if len(secret) != SECRET_BYTES or len(noise) != (threshold - 1) * COEFFICIENT_BYTES:
        raise ValueError(f"need {SECRET_BYTES} bytes of secret and {COEFFICIENT_BYTES} of noise a coefficient")
    if not 1 <= threshold <= len(points) or len(set(points)) < len(points) or min(points) < 1:
        raise ValueError(f"need 1 <= threshold <= number of different points > 0, got {threshold} and {points}")
    cut = [noise[k : k + COEFFICIENT_BYTES] for k in range(0, len(noise), COEFFICIENT_BYTES)]
    coefficients = [int.from_bytes(part, "big") % PRIME for part in [secret, *cut]]
    return [_at(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in points]


def _at(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of the first `threshold` shares, by point; a ValueError if there are fewer, or they do not fit."""
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, and {threshold} are needed")
    chosen = dict(list(shares.items())[:threshold])
    secret = 0
    for x, share in chosen.items():
        top, bottom = 1, 1
        for other in chosen.keys() - {x}:
            top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
        secret += int.from_bytes(share, "big") * top * pow(bottom, -1, PRIME)
    secret %= PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("the shares are not those of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")
