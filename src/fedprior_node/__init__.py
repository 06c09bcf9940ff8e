"""The node's side of Flower, without PyTorch, which importing anything of `fedprior` would import."""

from fedprior_node.resident import resident_app

__all__ = ["resident_app"]
