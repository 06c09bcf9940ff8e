"""E-steps, one file each."""

from fedprior.inference.alternating import Alternating
from fedprior.inference.ditto import Ditto
from fedprior.inference.gains import Gains
from fedprior.inference.gated import Gated
from fedprior.inference.moreau import Moreau
from fedprior.inference.point import Point

__all__ = ["Alternating", "Ditto", "Gains", "Gated", "Moreau", "Point"]
