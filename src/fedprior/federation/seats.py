"""Who sits where: which node is which partition.

Nodes are told apart by the partition that they claim. The first node of a partition keeps it for as long as it is
there; who may join at all is decided by Flower, by keys (docs/federation.md).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from fedprior.federation import replies
from fedprior.federation.node import about
from fedprior.federation.post import Failure, Post
from fedprior.round import RoundWork

log = logging.getLogger(__name__)


class NodeError(RuntimeError):
    """A node that cannot take part, before round one."""


@dataclass
class Seats:
    """The nodes that a server knows.

    Attributes:
        post: which reaches them.
        partitions: how many there are; all must have a node before round one.
        seconds: that nodes have before round one.
        poll: seconds between two looks.
        places: partition -> node.
        met: is round one past this?
    """

    post: Post
    partitions: int
    seconds: float
    poll: float
    places: dict[int, int] = field(default_factory=dict)
    met: bool = False
    _claims: dict[int, int] = field(default_factory=dict)  # node -> partition, -1 for a useless node
    _hellos: dict[str, int] = field(default_factory=dict)  # message -> node

    def meet(self, work: RoundWork, hello: bytes) -> None:
        """Find out which node is which partition: wait for all of them before round one, for one of them later."""
        end = time.monotonic() + self.seconds
        while True:
            present = self.post.nodes()
            self._greet(present, work, hello)
            self._seat(present)
            missing = [p for p in range(self.partitions) if p not in self.places]
            if not missing or (self.met and self.places):
                break
            if time.monotonic() > end:
                if self.met:
                    break
                raise NodeError(
                    f"after {self.seconds:g} s there is no node of the partitions {missing}: start `fedprior federate "
                    f"supernode SERVER --partition {missing[0]} --partitions {self.partitions}`, or flower-supernode "
                    f'with --node-config "partition-id={missing[0]} num-partitions={self.partitions}"'
                )
            time.sleep(self.poll)
        self.met = True

    def _greet(self, present: set[int], work: RoundWork, hello: bytes) -> None:
        """Ask nodes that are new who they are, and hear those that were asked."""
        asked = set(self._hellos.values())
        new = sorted(present - self._claims.keys() - asked)
        self._hellos |= self.post.send(work.number, dict.fromkeys(new, hello), self.seconds)
        for message, answer in self.post.collect(self._hellos):
            node = self._hellos.pop(message, None)
            if node is not None:
                self._claims[node] = self._hear(node, answer, work)

    def _hear(self, node: int, answer: bytes | Failure, work: RoundWork) -> int:
        """The partition that a node claims. One that cannot take part ends the run before round one; later it is -1."""
        try:
            if isinstance(answer, Failure):
                raise ValueError(answer.reason)
            said = replies.hello(answer)
            if said["partitions"] != self.partitions or not 0 <= said["partition"] < self.partitions:
                raise ValueError(
                    f"it is partition {said['partition']} of {said['partitions']}, not of {self.partitions}: nodes= of "
                    "the run's configuration must be the nodes' --partitions"
                )
            for key, mine in about(work).items():
                if said.get(key) != mine:
                    raise ValueError(f"its {key} is {str(said.get(key))[:300]}, and the server's is {str(mine)[:300]}")
            if not self.met and said["partition"] in self._claims.values():
                raise ValueError(f"another node is partition {said['partition']} as well: give each its own")
            return said["partition"]
        except ValueError as error:
            if not self.met:
                raise NodeError(f"node {node} cannot take part: {error}") from error
            log.warning("node %d cannot take part: %s", node, error)
            return -1

    def _seat(self, present: set[int]) -> None:
        """The first node of a partition keeps it while it is there."""
        self.places = {p: n for p, n in self.places.items() if n in present}
        for node, partition in self._claims.items():
            if node in present and partition >= 0:
                self.places.setdefault(partition, node)
