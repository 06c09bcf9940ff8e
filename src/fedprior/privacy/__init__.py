"""Secure aggregation and differential privacy. Extra: privacy."""

from fedprior.privacy.dp import Privacy
from fedprior.privacy.secure_sum import SecureSum

__all__ = ["Privacy", "SecureSum"]
