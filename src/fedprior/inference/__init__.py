"""E-steps, one file each."""

from fedprior.inference.gated import Gated
from fedprior.inference.point import Point

__all__ = ["Gated", "Point"]
