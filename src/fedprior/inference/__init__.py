"""E-steps, one file each."""

from fedprior.inference.gains import Gains
from fedprior.inference.gated import Gated
from fedprior.inference.point import Point

__all__ = ["Gains", "Gated", "Point"]
