"""What the machines say, as protobuf messages."""

from __future__ import annotations

from baton.errors import BatonError, InternalError
from baton.logprobs import TokenLogprobs
from kv_transfer import receiver, sender
from kv_transfer.keys import TransferKey
from kv_transfer.ranges import BlockRange
from kv_transfer.v1 import transfer_pb2 as pb


def to_decode(key: TransferKey, effect: sender.SenderEffect) -> pb.PullResponse:
    """A sender's effect that is a message to the peer."""
    named = key.to_proto()
    match effect:
        case sender.SendReady(blocks):
            ready = pb.Ready(
                key=named,
                start_token=blocks.start_token,
                end_token=blocks.end_token,
                block_ids=blocks.source_blocks,
                checksums=blocks.checksums,
            )
            return pb.PullResponse(ready=ready)
        case sender.SendCommit(num_tokens, first_token_id, first_position, logprobs):
            commit = pb.Commit(
                key=named,
                num_tokens=num_tokens,
                first_token_id=first_token_id,
                first_position=first_position,
                first_logprobs=None if logprobs is None else logprobs.to_proto(),
            )
            return pb.PullResponse(commit=commit)
        case sender.SendReleased(ok):
            return pb.PullResponse(released=pb.Released(key=named, ok=ok))
        case sender.SendAborted(error):
            return aborted(key, error)
    raise InternalError(f"{effect!r} is no message")


def aborted(key: TransferKey, error: BatonError) -> pb.PullResponse:
    return pb.PullResponse(
        aborted=pb.Aborted(key=key.to_proto(), error_code=error.code, error_message=error.message)
    )


def to_prefill(key: TransferKey, effect: receiver.ReceiverEffect) -> pb.PullRequest:
    """A receiver's effect that is a message to the peer."""
    named = key.to_proto()
    match effect:
        case receiver.SendAttach(start_token, lease_ms):
            attach = pb.Attach(key=named, start_token=start_token, lease_ms=lease_ms)
            return pb.PullRequest(attach=attach)
        case receiver.SendRenew(lease_ms):
            return pb.PullRequest(renew=pb.Renew(key=named, lease_ms=lease_ms))
        case receiver.SendRelease(num_bytes):
            return pb.PullRequest(release=pb.Release(key=named, num_bytes=num_bytes))
        case receiver.SendAbandon():
            return pb.PullRequest(abandon=pb.Abandon(key=named))
    raise InternalError(f"{effect!r} is no message")


def fetch(key: TransferKey, blocks: BlockRange) -> pb.PullRequest:
    """Asks a two-sided sender for a range whose receives are posted."""
    message = pb.Fetch(
        key=key.to_proto(), start_token=blocks.start_token, end_token=blocks.end_token
    )
    return pb.PullRequest(fetch=message)


def first_logprobs(message: pb.Commit) -> TokenLogprobs | None:
    if not message.HasField("first_logprobs"):
        return None
    return TokenLogprobs.from_proto(message.first_logprobs)


def announced(message: pb.Ready) -> BlockRange:
    return BlockRange(
        message.start_token,
        message.end_token,
        tuple(message.block_ids),
        checksums=tuple(message.checksums),
    )
