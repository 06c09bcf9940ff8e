"""Priors p(phi_s | eta), one file each."""

from fedprior.priors.custom import Custom
from fedprior.priors.dropout import Dropout
from fedprior.priors.gaussian import Gaussian
from fedprior.priors.group_lasso import GroupLasso
from fedprior.priors.personal import Personal
from fedprior.priors.shared_gates import SharedGates
from fedprior.priors.spike_slab import SpikeSlab
from fedprior.priors.split import Split

__all__ = ["Custom", "Dropout", "Gaussian", "GroupLasso", "Personal", "SharedGates", "SpikeSlab", "Split"]
