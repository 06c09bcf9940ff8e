"""The node's side of Flower: a ClientApp around a function of bytes. Nothing else on a node knows Flower."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]

from fedprior_node import mail

Place = tuple[int, int]
"""A node's partition, and how many there are."""


def app(answer: Callable[[bytes, Place, int], bytes]) -> ClientApp:
    """A ClientApp that answers each message's blob with that of `answer(blob, place, number of the node)`."""
    made = ClientApp()

    @made.train("fedprior")
    def train(message: Message, context: Context) -> Message:
        return mail.reply(message, answer(mail.blob(message), place(context), context.node_id))

    return made


def place(context: Context) -> Place:
    """This node's partition and how many there are, from the SuperNode's --node-config."""
    values = [context.node_config.get(key) for key in ("partition-id", "num-partitions")]
    partition, partitions = (value if type(value) is int else -1 for value in values)
    if not 0 <= partition < partitions:
        raise ValueError(
            f"this SuperNode's partition-id is {values[0]!r} and its num-partitions is {values[1]!r}; start the first "
            'of three with --node-config "partition-id=0 num-partitions=3"'
        )
    return partition, partitions
