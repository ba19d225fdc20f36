"""The name of one transfer: unique across attempts and across restarts of either side."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.v1 import transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class TransferKey:
    """One attempt to move one request's KV between two processes.

    Both processes' epochs are part of it, so a message that outlived either
    process names no transfer of its successor.
    """

    transfer_id: bytes
    attempt: int
    prefill_epoch: bytes
    decode_epoch: bytes

    @classmethod
    def from_proto(cls, message: pb.TransferKey) -> TransferKey:
        return cls(
            message.transfer_id, message.attempt, message.prefill_epoch, message.decode_epoch
        )

    def to_proto(self) -> pb.TransferKey:
        return pb.TransferKey(
            transfer_id=self.transfer_id,
            attempt=self.attempt,
            prefill_epoch=self.prefill_epoch,
            decode_epoch=self.decode_epoch,
        )

    def __str__(self) -> str:
        return f"{self.transfer_id.hex()}/{self.attempt}"
