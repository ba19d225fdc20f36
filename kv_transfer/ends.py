"""A worker's ends of hand-offs: what it sends and what it receives, each either way.

Prefill sends to decode; and where decode holds what prefill lacks, it lends that, and prefill
pulls it: the same two ends with their parts exchanged, and fault points of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.config import KvTransferConfig, SessionConfig
from baton.errors import BatonError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.logprobs import TokenLogprobs
from baton.telemetry import WorkerMetrics
from kv_transfer.blocks import CopyBlocks
from kv_transfer.client import KvReceiver
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.service import KvSender

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory

OnReady = Callable[[TransferKey, int, int, int, TokenLogprobs | None], None]
OnFailed = Callable[[TransferKey, BatonError], None]
OnDrained = Callable[[TransferKey], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffEnds:
    """What all ends of one worker are made with. The callbacks are those of ``KvSender`` and
    ``KvReceiver``."""

    worker_id: str
    epoch: bytes
    digest: bytes
    generation: str
    layout: KvLayout
    memory: KvMemory | GpuMemory
    secret: str
    config: KvTransferConfig
    session: SessionConfig
    metrics: WorkerMetrics
    faults: Faults
    on_fatal: Callable[[BaseException], None]
    """See ``KvReceiver``."""
    host: str = "127.0.0.1"
    copy_blocks: CopyBlocks | None = None
    """What receivers copy whole blocks with, where they can read the sender's memory."""

    def sender(self, *, on_freed: Callable[[TransferKey, str], None]) -> KvSender:
        """Of a prefill worker, for what it has computed."""
        return KvSender(**self._common(), faults=self.faults, on_freed=on_freed)

    def lender(
        self,
        *,
        on_freed: Callable[[TransferKey, str], None],
        on_wanted: Callable[[TransferKey, int], None],
    ) -> KvSender:
        """Of a decode worker, for what it holds."""
        faults = self.faults.named("prefill", "lend")
        return KvSender(**self._common(), faults=faults, on_freed=on_freed, on_wanted=on_wanted)

    def receiver(
        self, *, on_ready: OnReady, on_failed: OnFailed, on_drained: OnDrained
    ) -> KvReceiver:
        """Of a decode worker, for what was computed for it."""
        return KvReceiver(
            **self._common(),
            session=self.session,
            copy_blocks=self.copy_blocks,
            on_fatal=self.on_fatal,
            faults=self.faults,
            on_ready=on_ready,
            on_failed=on_failed,
            on_drained=on_drained,
        )

    def puller(
        self, *, on_ready: OnReady, on_failed: OnFailed, on_drained: OnDrained
    ) -> KvReceiver:
        """Of a prefill worker, for what decode workers lend."""
        return KvReceiver(
            **self._common(),
            session=self.session,
            copy_blocks=self.copy_blocks,
            on_fatal=self.on_fatal,
            faults=self.faults.named("decode", "pull"),
            outcomes=self.metrics.pulls,
            on_ready=on_ready,
            on_failed=on_failed,
            on_drained=on_drained,
        )

    def _common(self) -> dict[str, Any]:
        return {
            "worker_id": self.worker_id,
            "epoch": self.epoch,
            "digest": self.digest,
            "generation": self.generation,
            "layout": self.layout,
            "memory": self.memory,
            "secret": self.secret,
            "config": self.config,
            "metrics": self.metrics,
            "host": self.host,
        }
