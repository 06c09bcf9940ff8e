"""E-steps, one file each."""

from fedprior.inference.alternating import Alternating
from fedprior.inference.averaged import Averaged
from fedprior.inference.bregman import Bregman
from fedprior.inference.centres import Centres
from fedprior.inference.chain import Chain
from fedprior.inference.confidence import Confidence
from fedprior.inference.ditto import Ditto
from fedprior.inference.gains import Gains
from fedprior.inference.gated import Gated
from fedprior.inference.langevin import Langevin
from fedprior.inference.laplace import Laplace
from fedprior.inference.mean_field import MeanField
from fedprior.inference.mixture import Mixture
from fedprior.inference.moreau import Moreau
from fedprior.inference.point import Point
from fedprior.inference.reweighted import Reweighted
from fedprior.inference.rough import Rough
from fedprior.inference.rules import Rules
from fedprior.inference.sites import Sites
from fedprior.inference.tilted import Tilted

__all__ = [
    "Alternating",
    "Averaged",
    "Bregman",
    "Centres",
    "Chain",
    "Confidence",
    "Ditto",
    "Gains",
    "Gated",
    "Langevin",
    "Laplace",
    "MeanField",
    "Mixture",
    "Moreau",
    "Point",
    "Reweighted",
    "Rough",
    "Rules",
    "Sites",
    "Tilted",
]
