"""Secure aggregation and differential privacy. Extra: privacy."""

from fedprior.privacy.dp import NoiseWarning, Privacy
from fedprior.privacy.secure_sum import SecureSum

__all__ = ["NoiseWarning", "Privacy", "SecureSum"]
