"""What the server and its nodes share: the algorithm, the model, and where the data are.

`fp.run(ALGORITHM, MODEL, clients(0, 1), rounds=3, test=held_out())` simulates the same federation in one process.
"""

import fedprior as fp
from fedprior.federation import Node

CLIENTS = 20
ALGORITHM = fp.fedavg(lr=0.1, epochs=3)
MODEL = fp.models.mlp(inputs=64, hidden=(64,))


def clients(partition, partitions):
    """The clients of one node: here each takes its own of a public data set.

    Of your own data, return a list of `fp.Client(index, name, fp.Examples(x, y))`, read from this machine's disk. The
    node of partition p has the clients p, p + partitions, p + 2 * partitions, ...: one a node is client p.
    """
    train, _ = fp.data.load("digits")
    return fp.data.dirichlet(train, clients=CLIENTS, alpha=1.0, seed=0)


def node():
    """What a SuperNode runs; a client's personal state stays in ~/.fedprior/states."""
    return Node(ALGORITHM, clients, MODEL)


def held_out():
    """The server's test set. A server without data writes example=fp.Examples(x, y) in server_app.py instead."""
    _, test = fp.data.load("digits")
    return test
