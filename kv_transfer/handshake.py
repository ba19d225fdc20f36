"""What two workers tell each other before the first transfer, and what they must agree on.

Decode says who it is and which transports it can use; prefill checks that, picks
one and answers with its layout; decode checks the answer. Whatever differs is
named, since both ends' operators will read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.config import KvTransferConfig
from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from baton.protocol import PROTOCOL_VERSION
from kv_transfer.transports import cuda_ipc_links, gloo_links, nixl_links, shared_memory
from kv_transfer.v1 import transfer_pb2 as pb

SAME_HOST = (shared_memory.NAME, cuda_ipc_links.NAME)
"""Transports for two workers of one host, user and network namespace."""

_LAYOUT = ("num_kv_heads", "num_layers", "num_kv_parts", "block_size", "head_dim", "dtype")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker is, for the purpose of pairing it with another."""

    worker_id: str
    epoch: bytes
    digest: bytes
    generation: str
    layout: KvLayout
    host_id: str


def allowed_transports(config: KvTransferConfig, *, on_gpu: bool) -> tuple[str, ...]:
    """Of this worker, whose KV lies on a GPU or not, the best first."""
    if config.transport != "auto":
        return (config.transport,)
    names = [cuda_ipc_links.NAME if on_gpu else shared_memory.NAME]
    if nixl_links.installed():
        names.append(nixl_links.NAME)
    if gloo_links.installed() and config.network == "any":
        names.append(gloo_links.NAME)
    return tuple(names)


def required_transports(config: KvTransferConfig) -> tuple[str, ...]:
    """Those without which this worker must not start."""
    if config.transport != "auto":
        return (config.transport,)
    return (nixl_links.NAME,) if config.network == "rdma" else ()


def check_transport(config: KvTransferConfig, *, on_gpu: bool) -> None:
    """Raises ConfigurationError where the one that is asked for cannot reach this worker's KV."""
    lies, unfit = (
        ("on a GPU", shared_memory.NAME)
        if on_gpu
        else ("in the host's memory", cuda_ipc_links.NAME)
    )
    if config.transport == unfit:
        raise ConfigurationError(
            f"kv_transfer.transport is {unfit}, but this worker's KV lies {lies}; set auto, or "
            "another engine.device",
            param="kv_transfer.transport",
        )


def make_hello(identity: Identity, transports: Sequence[str]) -> pb.PeerHello:
    return pb.PeerHello(
        protocol_version=PROTOCOL_VERSION,
        generation=identity.generation,
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        digest=identity.digest,
        host_id=identity.host_id,
        transports=transports,
    )


def refuse_hello(hello: pb.PeerHello, identity: Identity) -> str | None:
    """Why prefill cannot serve this decode worker; None when it can."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return _differ("protocol version", PROTOCOL_VERSION, hello.protocol_version)
    if hello.generation != identity.generation:
        return _differ("rollout generation", identity.generation, hello.generation)
    if hello.digest != identity.digest:
        what = "compatibility digest (weights revision, KV dtype, KV layout, or GPU beside CPU)"
        return _differ(what, identity.digest.hex(), hello.digest.hex())
    return None


def choose_transport(
    hello: pb.PeerHello, identity: Identity, allowed: Sequence[str]
) -> tuple[str | None, str]:
    """The first transport of the peer's that works for both, or None and why there is none."""
    reasons = []
    for name in hello.transports:
        if name not in allowed:
            reasons.append(f"{name}: prefill is set to {' or '.join(allowed)}")
        elif name in SAME_HOST and hello.host_id != identity.host_id:
            reasons.append(f"{name}: the workers share no host, user and network namespace")
        else:
            return name, ""
    return None, "no transport works for both: " + ("; ".join(reasons) or "decode offers none")


def make_welcome(identity: Identity, *, verify: bool) -> pb.PeerWelcome:
    """Without its transport, which that transport fills in."""
    layout = identity.layout
    return pb.PeerWelcome(
        protocol_version=PROTOCOL_VERSION,
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        layout=pb.Layout(
            num_blocks=layout.num_blocks,
            num_kv_heads=layout.num_kv_heads,
            num_layers=layout.num_layers,
            block_size=layout.block_size,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
            strides=layout.strides,
            num_kv_parts=layout.num_kv_parts,
        ),
        verify=verify,
    )


def refuse_welcome(
    welcome: pb.PeerWelcome, identity: Identity, *, worker_id: str, verify: bool
) -> str | None:
    """Why decode cannot pull from this prefill worker; None when it can."""
    if welcome.protocol_version != PROTOCOL_VERSION:
        return _differ("protocol version", PROTOCOL_VERSION, welcome.protocol_version)
    if welcome.worker_id != worker_id:
        return f"{welcome.worker_id} answers where {worker_id} was expected"
    mine, theirs = identity.layout, welcome.layout
    for name in _LAYOUT:
        if getattr(mine, name) != getattr(theirs, name):
            return _differ(f"KV layout ({name})", getattr(mine, name), getattr(theirs, name))
    if tuple(theirs.strides) != mine.strides:
        return _differ("KV layout (strides)", mine.strides, tuple(theirs.strides))
    if verify and not welcome.verify:
        return "kv_transfer.verify differs: it is on here and off at the peer"
    return None


def layout_of(welcome: pb.PeerWelcome, identity: Identity) -> KvLayout:
    """The peer's, once ``refuse_welcome`` found nothing: pools may differ in size only."""
    return replace(identity.layout, num_blocks=welcome.layout.num_blocks)


def _differ(what: str, mine: object, theirs: object) -> str:
    return f"{what} differs: {mine} here, {theirs} at the peer"
