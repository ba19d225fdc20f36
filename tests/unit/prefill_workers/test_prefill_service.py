"""A gateway's Open becomes a job."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.sampling_open import PLAN
from support.worker_rig import Recorder

from baton.errors import ContextLengthError
from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from prefill_workers.scheduler import Lender
from prefill_workers.service import PrefillService, lender_of

EPOCH = b"p" * 16
KEY = StreamKey(1, 5)


@pytest.mark.parametrize("priority", [-(2**63), 0, 2**63 - 1])
def test_open_brings_the_jobs_priority(priority: int) -> None:
    inbox, worker = Recorder(), SimpleNamespace(open="open")
    parts: Any = SimpleNamespace(
        plan=PLAN, identity=SimpleNamespace(epoch=EPOCH), inbox=inbox, outbox=Recorder()
    )
    service = PrefillService(worker, parts)  # type: ignore[arg-type]
    message = pb.Open(
        stream_id=5,
        prompt_token_ids=[5, 6, 7],
        max_tokens=4,
        priority=priority,
        handoff=pb.Handoff(prefill_epoch=EPOCH),
    )
    service.on_open(KEY, pb.Open.FromString(message.SerializeToString()))
    [(_, (command, job), _)] = inbox.calls
    assert command == "open"
    assert (job.key, job.priority) == (KEY, priority)


@pytest.mark.parametrize("address", ["", "10.0.0.7:4000"])
def test_decode_may_be_pulled_from_where_the_gateway_says_its_address(address: str) -> None:
    handoff = pb.Handoff(decode_worker_id="decode-3", decode_transfer_address=address)
    assert lender_of(handoff) == (Lender("decode-3", address) if address else None)


@pytest.mark.parametrize(("num_prompt", "num_emitted", "fits"), [(509, 2, True), (509, 3, False)])
def test_input_and_one_token_have_to_fit_and_the_rest_of_the_answer_need_not(
    num_prompt: int, num_emitted: int, fits: bool
) -> None:
    inbox, outbox = Recorder(), Recorder()
    parts: Any = SimpleNamespace(
        plan=PLAN, identity=SimpleNamespace(epoch=EPOCH), inbox=inbox, outbox=outbox
    )
    service = PrefillService(SimpleNamespace(open="open"), parts)  # type: ignore[arg-type]
    message = pb.Open(
        prompt_token_ids=[5] * num_prompt,
        emitted_token_ids=[6] * num_emitted,
        max_tokens=100_000,
        handoff=pb.Handoff(prefill_epoch=EPOCH),
    )
    assert PLAN.max_model_len == 512
    service.on_open(KEY, message)
    [(_, (_, *posted), _)] = inbox.calls
    error = posted[-1]
    assert isinstance(error, ContextLengthError) != fits
    if not fits:
        assert "513 tokens; this prefill worker holds 512" in error.message
