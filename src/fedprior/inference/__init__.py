"""E-steps, one file each."""

from fedprior.inference.alternating import Alternating
from fedprior.inference.averaged import Averaged
from fedprior.inference.ditto import Ditto
from fedprior.inference.gains import Gains
from fedprior.inference.gated import Gated
from fedprior.inference.laplace import Laplace
from fedprior.inference.moreau import Moreau
from fedprior.inference.point import Point
from fedprior.inference.reweighted import Reweighted
from fedprior.inference.sites import Sites
from fedprior.inference.tilted import Tilted

__all__ = [
    "Alternating",
    "Averaged",
    "Ditto",
    "Gains",
    "Gated",
    "Laplace",
    "Moreau",
    "Point",
    "Reweighted",
    "Sites",
    "Tilted",
]
