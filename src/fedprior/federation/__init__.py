"""Real federations on Flower: the algorithm that was simulated, on machines that keep their data.

Needs flwr, which pins several packages down: give it an environment of its own, `pip install 'fedprior[flower]'`.
"""

from importlib.util import find_spec

if find_spec("flwr") is None:
    raise ModuleNotFoundError("federations need Flower: pip install 'fedprior[flower]', in an environment of its own")

from fedprior.federation.client import client_app
from fedprior.federation.engine import GridEngine, Roster
from fedprior.federation.node import Node
from fedprior.federation.seats import NodeError
from fedprior.federation.server import serve, server_app
from fedprior.federation.settings import Settings

__all__ = ["GridEngine", "Node", "NodeError", "Roster", "Settings", "client_app", "serve", "server_app"]
