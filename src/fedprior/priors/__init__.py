"""Priors p(phi_s | eta), one file each."""

from fedprior.priors.centres import Centres
from fedprior.priors.confidence import Confidence
from fedprior.priors.custom import Custom
from fedprior.priors.distilled import Distilled
from fedprior.priors.dropout import Dropout
from fedprior.priors.feddyn import FedDyn
from fedprior.priors.gaussian import Gaussian
from fedprior.priors.group_lasso import GroupLasso
from fedprior.priors.learned_scale import LearnedScale
from fedprior.priors.mixture import Mixture
from fedprior.priors.niw import NIW
from fedprior.priors.online_laplace import OnlineLaplace
from fedprior.priors.personal import Personal
from fedprior.priors.random_effects import RandomEffects
from fedprior.priors.rules import Rules
from fedprior.priors.scaffold import Scaffold
from fedprior.priors.scale_mixture import ScaleMixture
from fedprior.priors.shared_gates import SharedGates
from fedprior.priors.sites import Sites
from fedprior.priors.sparse_mixture import SparseMixture
from fedprior.priors.spike_slab import SpikeSlab
from fedprior.priors.split import Split

__all__ = [
    "NIW",
    "Centres",
    "Confidence",
    "Custom",
    "Distilled",
    "Dropout",
    "FedDyn",
    "Gaussian",
    "GroupLasso",
    "LearnedScale",
    "Mixture",
    "OnlineLaplace",
    "Personal",
    "RandomEffects",
    "Rules",
    "Scaffold",
    "ScaleMixture",
    "SharedGates",
    "Sites",
    "SparseMixture",
    "SpikeSlab",
    "Split",
]
