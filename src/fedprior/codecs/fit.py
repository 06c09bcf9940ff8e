"""Which codecs an algorithm's messages stand: refused where the algorithm is made."""

from __future__ import annotations

from typing import Any

from fedprior.codecs.topk import TopK


def check(algorithm: Any) -> None:
    """A ValueError for codecs that leave out what must arrive, or round what does not bear it.

    Entries that a codec leaves out must be differences, and what is sent late must still count.

    Args:
        algorithm: an Algorithm.
    """
    codec, prior = algorithm.codec, type(algorithm.prior).__name__
    if isinstance(algorithm.downlink or codec, TopK):
        raise ValueError("TopK would set most of the broadcast eta to zero: write downlink=Dense(), or Sparse()")
    if isinstance(codec, TopK) and not algorithm.delta:
        raise ValueError("TopK would set most of what the clients learned to zero: write delta=True")
    if algorithm.feedback and not algorithm.delta:
        raise ValueError("feedback=True adds up differences: write delta=True as well")
    if algorithm.feedback and (algorithm.samples or hasattr(algorithm.prior, "reference")):
        raise ValueError(
            "feedback=True needs statistics that are means over all clients, and those of "
            f"{prior} are over the clients whose gates are open: leave feedback out"
        )
    if algorithm.feedback and hasattr(algorithm.prior, "cut"):
        raise ValueError(
            f"feedback=True sends late what was left out, and {prior} removes units, whose "
            "weights nobody waits for any more: leave feedback out"
        )
    _check_precise(algorithm)


def _check_precise(algorithm: Any) -> None:
    """Precisions span orders of magnitude, and an integer's steps are those of a row's largest value."""
    terms, fields = (getattr(algorithm.prior, name, ()) for name in ("precise", "precise_eta"))
    for part, codec, names in (
        ("codec", algorithm.codec, terms),
        ("downlink", algorithm.downlink or algorithm.codec, fields),
    ):
        if names and (getattr(codec, "value_type", "").startswith("int") or getattr(codec, "fraction", 1.0) < 1):
            raise ValueError(
                f"{part}={codec} sets small values to zero, and {type(algorithm.prior).__name__} divides by sums of "
                f"{' and '.join(names)}, which must arrive: write {part}=Dense(), or a value_type of 'bfloat16'"
            )
