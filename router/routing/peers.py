"""What gateways tell each other of their decisions, as a policy sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PeerShare:
    """What other gateways gave one worker that its report does not tell of yet."""

    num_tokens: int = 0
    """Input tokens that it has to compute."""
    num_blocks: int = 0
    num_sequences: int = 0


class PeerLoad(Protocol):
    """This gateway's link with the others. Workers are named by their epochs."""

    def given(self, epoch: bytes, num_tokens: int, num_blocks: int) -> None:
        """This gateway has just given the worker a sequence: to be told to the others."""
        ...

    def since(self, epoch: bytes, load_at: float | None) -> PeerShare:
        """What the others gave the worker after ``load_at``, which is when it took the
        counts of the report that we hold, on the event loop's clock; where we hold none,
        all of it that has not expired."""
        ...


class NoPeers:
    """Of a gateway that is alone."""

    def given(self, epoch: bytes, num_tokens: int, num_blocks: int) -> None:
        """Nobody is there to be told."""

    def since(self, epoch: bytes, load_at: float | None) -> PeerShare:
        return PeerShare()


ALONE: PeerLoad = NoPeers()
