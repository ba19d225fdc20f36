"""What a decode worker lends: KV that it holds of an input whose prefill worker lacks it.

1. ASKED: the prefill worker attaches to the way back of a hand-off that this worker receives.
2. LENT: the blocks have a reference more, whatever becomes of their stream, and the hand-off's
   own machine, with the parts exchanged, serves them (``kv_transfer/service.py``).
3. OVER: released, given up, expired, or the peer is lost; nobody reads them, so the reference
   goes.

All of it happens on the engine thread; ``lender`` is called on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from baton.errors import TransferError
from baton.worker.inbox import Inbox
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Sequence
from kv_transfer.keys import TransferKey
from kv_transfer.service import KvSender


class Lends:
    """``receiving`` gives the sequence whose hand-off is under way, if it is."""

    def __init__(
        self,
        kv: KvCache,
        lender: KvSender,
        inbox: Inbox,
        *,
        receiving: Callable[[TransferKey], Sequence | None],
    ) -> None:
        self._kv = kv
        self._lender = lender
        self._inbox = inbox
        self._receiving = receiving
        self._lent: dict[TransferKey, list[int]] = {}

    def __len__(self) -> int:
        return len(self._lent)

    def asked(self, lend: TransferKey, start_token: int) -> None:
        """The prefill worker wants tokens ``[start_token, what is held)``."""
        sequence = self._receiving(lend.way_back)
        size = self._kv.layout.block_size
        num_held = 0 if sequence is None else sequence.num_shared_tokens
        if sequence is None or start_token % size or not start_token < num_held:
            refusal = TransferError(f"nothing is held here of tokens from {start_token} on")
            self._inbox.call(self._lender.refuse, lend, refusal)
            return
        if lend in self._lent:
            return
        block_ids = sequence.block_table[: num_held // size]
        self._lent[lend] = block_ids[start_token // size :]
        self._kv.pool.retain(self._lent[lend])
        offer = partial(self._lender.offer, start_token=start_token, num_tokens=num_held)
        self._inbox.call(offer, lend)
        self._inbox.call(self._lender.ready, lend, num_held, block_ids)
        self._inbox.call(self._lender.commit, lend, 0, 0)  # a lend brings no token

    def over(self, lend: TransferKey) -> None:
        """Nobody reads its blocks any more."""
        self._kv.pool.release(reversed(self._lent.pop(lend)))
