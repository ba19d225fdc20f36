"""The decode loop: what it answers, and where blocks are after each ending."""

from __future__ import annotations

import dataclasses

import pytest
from support.sequences import sequence, small_cache
from support.worker_rig import PretendEngine, Recorder, Rig

from baton.config import EngineConfig, KvTransferConfig
from baton.errors import DrainingError, TransferError
from baton.logprobs import TokenLogprobs
from baton.v1 import session_pb2 as pb
from baton.worker.host import report_from
from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeScheduler, DecodeStream
from decode_workers.worker import DecodeWorker
from engine.intake import StopRule
from kv_transfer.keys import TransferKey

TRANSFER = TransferKey(b"t" * 16, 0, b"p" * 16, b"d" * 16)
KEY = StreamKey(1, 5)


class DecodeRig(Rig):
    def __init__(
        self, *, num_blocks: int = 16, max_waiting: int = 8, max_num_seqs: int = 8
    ) -> None:
        super().__init__("decode")
        self.kv = small_cache(num_blocks)
        self.receiver, self.lender = Recorder(), Recorder()
        self.engine = PretendEngine(self.kv)
        self.worker = DecodeWorker(
            engine=self.engine,  # type: ignore[arg-type]
            scheduler=DecodeScheduler(
                self.kv,
                max_num_batched_tokens=9,
                max_num_seqs=max_num_seqs,
                watermark_blocks=1,
            ),
            receiver=self.receiver,  # type: ignore[arg-type]
            lender=self.lender,  # type: ignore[arg-type]
            inbox=self.inbox,
            outbox=self.outbox,
            metrics=self.metrics,
            faults=self.faults,
            config=EngineConfig(max_waiting=max_waiting),
            transfer_config=KvTransferConfig(),
        )

    def stream(
        self, tokens: list[int], *, key: StreamKey = KEY, local: bool = False, most: int = 3
    ) -> DecodeStream:
        return DecodeStream(
            key=key,
            request_id="r",
            sequence=sequence(key, tokens),
            stop=StopRule(most, frozenset({99})),
            deadline=1e12,
            transfer=None if local else TRANSFER,
            handoff=None if local else pb.Handoff(prefill_transfer_address="127.0.0.1:9"),
            queued_at=1e12,
            num_input_tokens=len(tokens),
        )

    async def step(self) -> None:
        self.worker.step()
        await self.settle()
        self.kv.pool.check()

    def states(self) -> tuple[int, int]:
        counts = self.kv.pool.counts()
        return counts.referenced, counts.quarantined


async def test_handed_over_stream_decodes_from_the_senders_first_token() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10))))
    await rig.step()
    assert rig.reserved == [(KEY, 0)]
    [(name, args, options)] = rig.receiver.calls
    assert (name, args) == ("begin", (TRANSFER,))
    assert (options["start_token"], options["num_tokens"]) == (0, 10)
    assert len(options["block_ids"]) == 3
    rig.worker.handed_over(TRANSFER, 42, 0, 10)
    for _ in range(3):
        await rig.step()
    assert rig.tokens == [(KEY, 0, 42), (KEY, 1, 7), (KEY, 2, 7)]
    closed = rig.closed[KEY]
    assert closed.reason == pb.CLOSE_REASON_LENGTH
    assert (closed.num_received_tokens, closed.num_computed_tokens) == (10, 0)
    assert rig.states() == (0, 0)
    assert rig.counted("received") == 10
    assert rig.counted("computed") == 0


async def test_each_tokens_log_probabilities_leave_with_it_the_handed_over_first_ones_too() -> None:
    rig = DecodeRig()
    first, later = TokenLogprobs(-0.25), TokenLogprobs(-0.5, ((7, -0.5),))
    rig.worker.open(rig.stream(list(range(10))))
    await rig.step()
    rig.worker.handed_over(TRANSFER, 42, 0, 10, first)
    rig.engine.logprobs = later
    for _ in range(3):
        await rig.step()
    assert rig.tokens == [(KEY, 0, 42), (KEY, 1, 7), (KEY, 2, 7)]
    assert rig.logprobs == {0: first, 1: later, 2: later}


async def test_reservation_is_answered_before_the_step_that_others_compute_in() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream([1, 2, 3], key=StreamKey(1, 4), local=True))
    await rig.step()
    rig.worker.open(rig.stream(list(range(10))))
    unsent: list[bool] = []
    rig.engine.on_step = lambda: unsent.append(rig.has_unsent)
    await rig.step()
    assert unsent == [False]
    assert (KEY, 0) in rig.reserved


async def test_held_prefix_is_not_asked_for_again() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(9)), local=True, most=1))
    for _ in range(3):
        await rig.step()
    second = StreamKey(1, 6)
    rig.worker.open(rig.stream([*range(8), 50, 51], key=second))
    await rig.step()
    assert rig.reserved[-1] == (second, 8)
    options = rig.receiver.calls[-1][2]
    assert (options["start_token"], options["num_tokens"]) == (8, 10)
    assert len(options["block_ids"]) == 1
    rig.worker.handed_over(TRANSFER, 42, 0, 2)
    await rig.step()
    assert (rig.counted("cached"), rig.counted("received")) == (8, 2)


async def test_cancel_while_receiving_quarantines_until_nothing_can_write() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10))))
    await rig.step()
    rig.worker.cancel(KEY)
    await rig.step()
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_CANCELLED
    assert rig.receiver.names() == ["begin", "cancel"]
    assert rig.states() == (0, 3)
    assert not rig.worker.idle
    rig.worker.drained(TRANSFER)
    await rig.step()
    assert rig.states() == (0, 0)
    assert rig.worker.idle


async def test_handoff_that_is_ready_after_its_cancel_is_dropped_and_freed() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10))))
    await rig.step()
    rig.worker.cancel(KEY)
    rig.worker.handed_over(TRANSFER, 42, 0, 10)
    rig.worker.drained(TRANSFER)
    rig.worker.drained(TRANSFER)
    await rig.step()
    assert rig.tokens == []
    assert rig.states() == (0, 0)


async def test_failed_handoff_is_told_and_its_blocks_wait_for_the_drain() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10))))
    await rig.step()
    rig.worker.handoff_failed(TRANSFER, TransferError("sender died"))
    await rig.step()
    closed = rig.closed[KEY]
    assert (closed.reason, closed.error_code) == (pb.CLOSE_REASON_FAILED, "transfer_failed")
    assert rig.states() == (0, 3)
    assert rig.receiver.names() == ["begin"]
    rig.worker.drained(TRANSFER)
    await rig.step()
    assert rig.states() == (0, 0)


async def test_held_prefix_of_a_failed_handoff_stays_cached() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(9)), local=True, most=1))
    for _ in range(3):
        await rig.step()
    cached = rig.kv.pool.counts().cached
    rig.worker.open(rig.stream([*range(8), 50, 51], key=StreamKey(1, 6)))
    await rig.step()
    rig.worker.handoff_failed(TRANSFER, TransferError("sender died"))
    assert rig.states() == (0, 1)
    rig.worker.drained(TRANSFER)
    await rig.step()
    assert rig.kv.pool.counts().cached == cached


async def test_stop_token_ends_a_stream_and_is_its_last_token() -> None:
    rig = DecodeRig()
    rig.engine.token_id = 99
    rig.worker.open(rig.stream([1, 2], local=True))
    await rig.step()
    assert rig.tokens == [(KEY, 0, 99)]
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_STOP


async def test_local_prefill_counts_what_it_computed() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10)), local=True, most=1))
    for _ in range(2):
        await rig.step()
    assert rig.closed[KEY].num_computed_tokens == 10
    assert rig.counted("computed") == 10
    assert rig.receiver.calls == []


async def test_repeated_attempt_goes_on_at_its_position() -> None:
    rig = DecodeRig()
    stream = rig.stream([1, 2, 3, 70, 71], local=True, most=3)
    stream.sequence.num_prompt_tokens = 3
    rig.worker.open(stream)
    await rig.step()
    assert rig.tokens == [(KEY, 2, 7)]
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_LENGTH


@pytest.mark.parametrize("moment", ["queued", "receiving", "running"])
async def test_lost_session_ends_its_streams_and_no_others(moment: str) -> None:
    rig = DecodeRig(num_blocks=16)
    other = StreamKey(2, 5)
    rig.worker.open(rig.stream([30, 31], key=other, local=True, most=100))
    rig.worker.open(rig.stream(list(range(10)), local=moment != "receiving"))
    if moment != "queued":
        await rig.step()
    rig.worker.session_lost(1)
    rig.worker.drained(TRANSFER)
    await rig.step()
    assert KEY not in rig.closed
    rig.worker.cancel(other)
    await rig.step()
    assert list(rig.closed) == [other]
    assert rig.states() == (0, 0)
    assert rig.worker.idle


async def test_stream_past_its_deadline_fails_honestly() -> None:
    rig = DecodeRig()
    rig.worker.open(dataclasses.replace(rig.stream(list(range(10)), local=True), deadline=0.0))
    await rig.step()
    assert rig.closed[KEY].error_code == "deadline_exceeded"
    assert rig.states() == (0, 0)


async def test_reservation_without_room_is_refused_within_its_bound() -> None:
    rig = DecodeRig(num_blocks=4)
    rig.worker.open(rig.stream(list(range(12)), key=StreamKey(1, 1), local=True, most=9))
    await rig.step()
    rig.worker.open(dataclasses.replace(rig.stream(list(range(50, 60))), queued_at=0.0))
    await rig.step()
    assert rig.closed[KEY].error_code == "reservation_refused"
    assert rig.receiver.calls == []


async def test_full_queue_and_draining_worker_refuse_what_comes() -> None:
    rig = DecodeRig(max_waiting=1, max_num_seqs=2)
    keys = [StreamKey(1, number) for number in range(4)]
    for key in keys:  # all at once: those that there is a place for do not count as waiting
        rig.worker.open(rig.stream([1, 2], key=key))
    await rig.step()
    assert {key: closed.error_code for key, closed in rig.closed.items()} == {
        keys[3]: "reservation_refused"
    }
    rig = DecodeRig()
    rig.worker.drain()
    rig.worker.open(rig.stream([1, 2]))
    await rig.step()
    assert rig.closed[KEY].error_code == "draining"
    assert report_from(rig.outbox, b"", session=1).draining


@pytest.mark.parametrize("moment", ["queued", "receiving", "running"])
async def test_stream_that_outlasts_the_drain_is_failed_so_that_it_goes_on_elsewhere(
    moment: str,
) -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10)), local=moment != "receiving", most=100))
    if moment != "queued":
        await rig.step()
    rig.worker.drain()
    if moment == "running":
        before = len(rig.tokens)
        await rig.step()
        assert len(rig.tokens) > before, "it goes on while the worker drains"
    assert not rig.worker.idle
    assert KEY not in rig.closed
    rig.worker.fail_all(DrainingError("decode-0 has gone away"))
    await rig.step()
    closed = rig.closed[KEY]
    assert (closed.reason, closed.error_code) == (pb.CLOSE_REASON_FAILED, "draining")
    if moment == "receiving":
        assert rig.receiver.names() == ["begin", "cancel"]
        assert not rig.worker.idle, "what may still be written to is waited for"
        rig.worker.drained(TRANSFER)
    await rig.step()
    assert rig.states() == (0, 0)
    assert rig.worker.idle


async def test_stream_that_was_admitted_may_still_be_handed_over_while_draining() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(10)), most=2))
    await rig.step()
    rig.worker.drain()
    rig.worker.handed_over(TRANSFER, 42, 0, 10)
    await rig.step()
    assert rig.tokens == [(KEY, 0, 42), (KEY, 1, 7)]
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_LENGTH
    assert rig.worker.idle


async def test_late_cancel_and_unknown_transfers_do_nothing() -> None:
    rig = DecodeRig()
    rig.worker.cancel(KEY)
    rig.worker.handed_over(TRANSFER, 1, 0, 5)
    rig.worker.handoff_failed(TRANSFER, TransferError("late"))
    rig.worker.drained(TRANSFER)
    await rig.step()
    assert rig.closed == {}
    assert rig.tokens == []


async def test_stream_id_in_use_changes_nothing_for_the_one_that_has_it() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream([1, 2, 3], local=True, most=1))
    rig.worker.open(rig.stream([4, 5, 6]))

    await rig.step()
    assert [key for key, *_ in rig.tokens] == [KEY]
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_LENGTH


async def test_local_prefill_tells_what_was_cached_when_it_gets_its_room() -> None:
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(9)), local=True, most=1))
    for _ in range(2):
        await rig.step()
    second = StreamKey(1, 6)
    rig.worker.open(rig.stream([*range(8), *range(50, 60)], key=second, local=True, most=1))
    await rig.step()
    assert rig.reserved == [(KEY, 0), (second, 8)]
    assert second not in [key for key, *_ in rig.tokens], "two steps compute it"
    await rig.step()
    assert second in [key for key, *_ in rig.tokens]
    assert len(rig.reserved) == 2


async def test_preempted_stream_does_not_count_its_own_blocks_as_cached() -> None:
    rig = DecodeRig(num_blocks=16)
    for n in range(4):
        tokens = list(range(100 * n, 100 * n + 4))
        rig.worker.open(rig.stream(tokens, key=StreamKey(2, n), local=True, most=12))
    while len(rig.tokens) < 12:
        await rig.step()
    rig.worker.open(rig.stream(list(range(900, 926)), local=True, most=2))
    for _ in range(60):
        await rig.step()
    assert rig.registry.get_sample_value(
        "baton_preemptions_total", {"worker": "w", "role": "decode"}
    )
    closed = rig.closed[KEY]
    assert (closed.num_cached_tokens, closed.num_computed_tokens) == (0, 26)


async def test_report_during_a_step_says_which_opens_it_includes_and_how_old_it_is() -> None:
    rig = DecodeRig()
    during: list[pb.Report] = []

    def step_begins() -> None:
        rig.clock.now += 0.7
        during.extend(report_from(rig.outbox, b"", session=session) for session in (1, 2))

    rig.engine.on_step = step_begins
    rig.worker.open(rig.stream(list(range(7)), local=True))
    await rig.step()
    assert [report.num_opens for report in during] == [1, 0]
    assert {(report.num_waiting_tokens, report.load_age_ms) for report in during} == {(7, 700)}
    rig.worker.session_lost(1)
    await rig.step()
    assert report_from(rig.outbox, b"", session=1).num_opens == 0
