"""Codecs: what travels, as bytes. No pickle."""

from fedprior.codecs.dense import Dense
from fedprior.codecs.entropy import Entropy
from fedprior.codecs.frame import ValueType, schema_of
from fedprior.codecs.reader import PayloadError
from fedprior.codecs.sparse import Sparse
from fedprior.codecs.topk import TopK

__all__ = ["Dense", "Entropy", "PayloadError", "Sparse", "TopK", "ValueType", "schema_of"]
