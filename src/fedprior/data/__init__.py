"""Data: sets known by name, partitions into clients, and the user's own arrays and tables."""

from fedprior.data.catalogue import Source, available, load
from fedprior.data.partition import by_key, dirichlet, iid, shards
from fedprior.data.population import LazyPopulation, Partition, autoencoding, paired
from fedprior.data.sources import from_arrays, from_dataset
from fedprior.data.tables import from_csv, from_parquet

__all__ = [
    "LazyPopulation",
    "Partition",
    "Source",
    "autoencoding",
    "available",
    "by_key",
    "dirichlet",
    "from_arrays",
    "from_csv",
    "from_dataset",
    "from_parquet",
    "iid",
    "load",
    "paired",
    "shards",
]
