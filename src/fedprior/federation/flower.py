"""The server's side of Flower: a ServerApp around a function, and a Grid as a post of blobs.

Nothing else on the server knows Flower, but the wire format that both sides share (fedprior_node/mail.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid, ServerApp  # pyright: ignore[reportMissingImports]

from fedprior.federation.post import Failure
from fedprior_node import mail

KEPT_SECONDS = 60  # that Flower keeps a message after its deadline


def app(main: Callable[[Grid, Mapping[str, Any], int], None]) -> ServerApp:
    """A ServerApp that calls `main(grid, the run's configuration, Flower's number of the run)`."""
    made = ServerApp()

    @made.main()
    def run(grid: Grid, context: Context) -> None:
        main(grid, context.run_config, context.run_id)

    return made


@dataclass(frozen=True)
class GridPost:
    """A Post on a Flower grid."""

    grid: Grid

    def nodes(self) -> set[int]:
        """Those that Flower takes to be there."""
        return set(self.grid.get_node_ids())

    def send(self, number: int, blobs: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """One message to each node."""
        messages = [mail.request(node, number, blob, seconds + KEPT_SECONDS) for node, blob in blobs.items()]
        return dict(zip(self.grid.push_messages(messages) if messages else (), blobs, strict=True))

    def collect(self, messages: Collection[str]) -> list[tuple[str, bytes | Failure]]:
        """What has come to these messages."""
        came = self.grid.pull_messages(list(messages)) if messages else ()
        return [(message.metadata.reply_to_message_id, _read(message)) for message in came]


def _read(message: Message) -> bytes | Failure:
    """The blob of an answer, or why there is none: an error of Flower's own, or another content."""
    if message.has_error():
        return Failure("dropped", f"Flower's error {message.error.code}: {message.error.reason}")
    try:
        return mail.blob(message)
    except ValueError as error:
        return Failure("rejected", str(error))
