"""The name of one transfer: unique across attempts and across restarts of either side."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.v1 import transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class TransferKey:
    """One attempt to move one request's KV from one process to another.

    Both processes' epochs are part of it, so a message that outlived either
    process names no transfer of its successor.
    """

    transfer_id: bytes
    attempt: int
    source_epoch: bytes
    destination_epoch: bytes

    @classmethod
    def from_proto(cls, message: pb.TransferKey) -> TransferKey:
        return cls(
            message.transfer_id, message.attempt, message.source_epoch, message.destination_epoch
        )

    def to_proto(self) -> pb.TransferKey:
        return pb.TransferKey(
            transfer_id=self.transfer_id,
            attempt=self.attempt,
            source_epoch=self.source_epoch,
            destination_epoch=self.destination_epoch,
        )

    @property
    def way_back(self) -> TransferKey:
        """Of what moves for the same attempt from the destination to the source."""
        return TransferKey(
            self.transfer_id, self.attempt, self.destination_epoch, self.source_epoch
        )

    def __str__(self) -> str:
        return f"{self.transfer_id.hex()}/{self.attempt}"
