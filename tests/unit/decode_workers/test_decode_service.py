"""A gateway's Open becomes a stream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.sampling_open import PLAN
from support.worker_rig import Recorder

from baton.errors import ContextLengthError
from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from decode_workers.service import DecodeService

EPOCH = b"d" * 16
KEY = StreamKey(1, 5)


@pytest.mark.parametrize("priority", [-(2**63), 0, 2**63 - 1])
def test_open_brings_the_streams_priority(priority: int) -> None:
    inbox, worker = Recorder(), SimpleNamespace(open="open")
    parts: Any = SimpleNamespace(
        plan=PLAN, identity=SimpleNamespace(epoch=EPOCH), inbox=inbox, outbox=Recorder()
    )
    service = DecodeService(worker, parts)  # type: ignore[arg-type]
    message = pb.Open(
        stream_id=5,
        prompt_token_ids=[5, 6, 7],
        max_tokens=4,
        priority=priority,
        handoff=pb.Handoff(decode_epoch=EPOCH),
    )
    service.on_open(KEY, pb.Open.FromString(message.SerializeToString()))
    [(_, (command, stream), _)] = inbox.calls
    assert command == "open"
    assert (stream.key, stream.priority) == (KEY, priority)


@pytest.mark.parametrize(("max_tokens", "fits"), [(502, True), (503, False)])
def test_prompt_and_whole_answer_have_to_fit(max_tokens: int, fits: bool) -> None:
    inbox = Recorder()
    parts: Any = SimpleNamespace(
        plan=PLAN, identity=SimpleNamespace(epoch=EPOCH), inbox=inbox, outbox=Recorder()
    )
    service = DecodeService(SimpleNamespace(open="open"), parts)  # type: ignore[arg-type]
    message = pb.Open(prompt_token_ids=[5] * 10, emitted_token_ids=[6] * 3, max_tokens=max_tokens)
    assert PLAN.max_model_len == 512
    service.on_open(KEY, message)
    [(_, (_, *posted), _)] = inbox.calls
    assert isinstance(posted[-1], ContextLengthError) != fits
