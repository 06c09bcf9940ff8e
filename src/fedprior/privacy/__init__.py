"""Secure aggregation and differential privacy. Extra: privacy."""
