"""The prefill loop: what it offers, and when blocks come back."""

from __future__ import annotations

import random

import pytest
from support.sequences import sequence, small_cache
from support.worker_rig import PretendEngine, Recorder, Rig

from baton.config import EngineConfig, RoutingConfig
from baton.errors import DrainingError
from baton.logprobs import TokenLogprobs
from baton.v1 import session_pb2 as pb
from baton.worker.host import report_from
from baton.worker.session_server import StreamKey
from engine.intake import StopRule
from kv_transfer.keys import TransferKey
from prefill_workers.pull_costs import PullCosts
from prefill_workers.pulls import Pulls
from prefill_workers.scheduler import JobState, Lender, PrefillJob, PrefillScheduler
from prefill_workers.worker import PrefillWorker
from router.routing.input_hashes import InputHashes
from router.routing.kv_aware import KvAware
from router.routing.peers import ALONE
from tests.support.routing import NAMES, Unheard, Workers, pick

TRANSFER = TransferKey(b"t" * 16, 0, b"p" * 16, b"d" * 16)
KEY = StreamKey(1, 5)


class PrefillRig(Rig):
    def __init__(self, *, num_blocks: int = 16, config: EngineConfig | None = None) -> None:
        super().__init__("prefill")
        self.kv = small_cache(num_blocks)
        self.sender, self.puller = Recorder(), Recorder()
        self.engine = PretendEngine(self.kv)
        scheduler = PrefillScheduler(
            self.kv,
            max_num_batched_tokens=8,
            max_num_seqs=8,
            moving_pays=lambda num_tokens, lender: num_tokens >= 4,
        )
        self.pulls = Pulls(
            self.kv,
            self.puller,  # type: ignore[arg-type]
            self.inbox,
            scheduler=scheduler,
            costs=PullCosts(block_size=4, token_bytes=16, step_tokens=8),
        )
        self.worker = PrefillWorker(
            engine=self.engine,  # type: ignore[arg-type]
            scheduler=scheduler,
            sender=self.sender,  # type: ignore[arg-type]
            pulls=self.pulls,
            inbox=self.inbox,
            outbox=self.outbox,
            metrics=self.metrics,
            faults=self.faults,
            config=config or EngineConfig(),
        )

    def job(self, tokens: list[int], *, key: StreamKey = KEY, most: int = 5) -> PrefillJob:
        return PrefillJob(
            key=key,
            request_id="r",
            sequence=sequence(key, tokens),
            stop=StopRule(most, frozenset({99})),
            transfer=TransferKey(bytes([key.stream_id]) * 16, 0, b"p" * 16, b"d" * 16),
            deadline=1e12,
        )

    async def step(self) -> None:
        self.worker.step()
        await self.settle()
        self.kv.pool.check()

    def referenced(self) -> int:
        return self.kv.pool.counts().referenced


def transfer(key: StreamKey = KEY) -> TransferKey:
    return TransferKey(bytes([key.stream_id]) * 16, 0, b"p" * 16, b"d" * 16)


async def test_job_waits_for_the_reservation_without_taking_blocks() -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job(list(range(10))))
    await rig.step()
    assert (rig.tokens, rig.sender.calls, rig.referenced()) == ([], [], 0)


async def test_full_worker_refuses_what_comes_until_somebody_goes() -> None:
    rig = PrefillRig(config=EngineConfig(max_num_seqs=1, max_waiting=1))
    keys = [StreamKey(1, number) for number in range(4)]
    for key in keys[:3]:
        rig.worker.open(rig.job([1, 2, 3], key=key))
    await rig.step()
    assert list(rig.closed) == [keys[2]]
    assert rig.closed[keys[2]].error_code == "overloaded"
    rig.worker.cancel(keys[0])
    rig.worker.open(rig.job([1, 2, 3], key=keys[3]))
    await rig.step()
    assert list(rig.closed) == [keys[2], keys[0]]


async def test_work_is_in_the_load_once_from_the_routers_decision_to_its_end() -> None:
    rig, workers = PrefillRig(), Workers()
    prefill, decode = workers.several("prefill", 1), workers.several("decode", 1)
    policy = KvAware(RoutingConfig(), workers.index, random.Random(0), workers.clock, ALONE)
    input_ = InputHashes(NAMES)
    await input_.prepare(range(12), prefill)

    def routed() -> int:
        """Tokens that the router believes to be waiting there."""
        return policy._standing(input_, prefill[0], 0).num_waiting

    async def step_and_report() -> int:
        await rig.step()
        report = report_from(rig.outbox, b"", session=KEY.session)
        prefill[0]._take(pb.WorkerMessage(report=report))
        return routed()

    assert await step_and_report() == 0
    pick(policy, prefill, decode, input_)
    prefill[0].open(pb.Open(stream_id=KEY.stream_id), Unheard())
    seen = [routed(), await step_and_report()]
    rig.worker.open(rig.job(list(range(12))))
    seen.append(await step_and_report())
    rig.worker.proceed(KEY, 0)
    seen += [await step_and_report() for _ in range(2)]
    assert seen == [12, 12, 12, 4, 0]  # decided, on its way, WAITING, RUNNING, LEASED


async def test_report_during_a_step_says_which_opens_it_includes_and_how_old_it_is() -> None:
    rig = PrefillRig()
    during: list[pb.Report] = []
    keys = [StreamKey(1, 5), StreamKey(1, 6), StreamKey(2, 5)]

    def step_begins() -> None:
        rig.clock.now += 0.7
        during.extend(report_from(rig.outbox, b"", session=session) for session in (1, 2, 3))

    rig.engine.on_step = step_begins
    rig.worker.open(rig.job(list(range(7)), key=keys[0]))
    rig.worker.proceed(keys[0], 0)
    rig.worker.open(rig.job(list(range(20, 25)), key=keys[1]))
    await rig.step()
    assert [report.num_opens for report in during] == [2, 0, 0]
    assert {report.num_waiting_tokens for report in during} == {12}
    assert {report.load_age_ms for report in during} == {700}
    rig.worker.open(rig.job([1], key=keys[2]))
    rig.outbox.refused(StreamKey(2, 6), DrainingError("no"))
    rig.worker.session_lost(1)
    await rig.step()
    reports = [report_from(rig.outbox, b"", session=session) for session in (1, 2)]
    assert [report.num_opens for report in reports] == [0, 2]
    assert [report.load_age_ms for report in reports] == [0, 0]


async def test_chunks_are_offered_as_they_are_computed_and_the_token_commits() -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job(list(range(10))))
    rig.worker.proceed(KEY, 4)
    for _ in range(2):
        await rig.step()
    table = rig.sender.calls[2][1][2]
    assert rig.sender.calls == [
        ("offer", (transfer(),), {"start_token": 4, "num_tokens": 10}),
        ("ready", (transfer(), 8, table[:2]), {}),
        ("ready", (transfer(), 10, table), {}),
        ("commit", (transfer(), 7, 0, None), {}),
    ]
    assert (rig.tokens, rig.logprobs) == ([(KEY, 0, 7)], {})
    assert rig.closed == {}
    assert rig.referenced() == 3
    rig.worker.freed(transfer(), "released")
    await rig.step()
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_HANDED_OFF
    assert rig.closed[KEY].num_computed_tokens == 10
    assert rig.referenced() == 0
    assert rig.worker.idle


async def test_first_tokens_log_probabilities_go_to_the_gateway_and_into_the_commit() -> None:
    rig = PrefillRig()
    rig.engine.logprobs = logprobs = TokenLogprobs(-0.5, ((7, -0.5), (8, -1.0)))
    rig.worker.open(rig.job([1, 2, 3]))
    rig.worker.proceed(KEY, 0)
    await rig.step()
    assert rig.sender.calls[-1] == ("commit", (transfer(), 7, 0, logprobs), {})
    assert (rig.tokens, rig.logprobs) == ([(KEY, 0, 7)], {0: logprobs})


async def test_account_of_a_handed_off_job_leaves_before_the_next_step_is_computed() -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job([1, 2, 3]))
    rig.worker.proceed(KEY, 0)
    await rig.step()
    other = StreamKey(1, 6)
    rig.worker.open(rig.job(list(range(20, 30)), key=other))
    rig.worker.proceed(other, 0)
    rig.worker.freed(transfer(), "released")
    unsent: list[bool] = []
    rig.engine.on_step = lambda: unsent.append(rig.has_unsent)
    await rig.step()
    assert unsent == [False]
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_HANDED_OFF


async def test_every_step_tells_which_blocks_the_prefix_cache_holds_now() -> None:
    rig = PrefillRig(num_blocks=3)
    rig.kv.pool.watch()
    job = rig.job(list(range(10)))
    rig.worker.open(job)
    rig.worker.proceed(KEY, 0)
    for num_full in (2, 2):
        await rig.step()
        assert rig.cache == dict.fromkeys(job.sequence.block_hashes[:num_full], True)
    hashes = list(job.sequence.block_hashes[:2])
    rig.worker.freed(transfer(), "released")
    other = rig.job(list(range(100, 112)), key=StreamKey(1, 6))
    rig.worker.open(other)
    rig.worker.proceed(other.key, 0)
    for _ in range(2):
        await rig.step()
    assert rig.cache == dict.fromkeys(hashes, False) | dict.fromkeys(
        other.sequence.block_hashes[:3], True
    )


async def test_fully_cached_input_is_offered_before_its_last_token_is_recomputed() -> None:
    rig = PrefillRig()
    first = StreamKey(1, 1)
    rig.worker.open(rig.job(list(range(8)), key=first))
    rig.worker.proceed(first, 0)
    await rig.step()
    rig.worker.freed(transfer(first), "released")
    rig.worker.open(rig.job(list(range(8))))
    rig.worker.proceed(KEY, 0)
    before = len(rig.sender.calls)
    await rig.step()
    names = [(name, args[1:2]) for name, args, _ in rig.sender.calls[before:]]
    assert names[:2] == [("offer", ()), ("ready", (8,))]
    assert names[-1] == ("commit", (7,))
    assert (rig.counted("computed"), rig.counted("cached")) == (9, 7)


async def test_what_another_job_computes_meanwhile_is_offered_and_counts_as_cached() -> None:
    rig = PrefillRig()
    first, second = StreamKey(1, 1), StreamKey(1, 2)
    for key in (first, second):
        rig.worker.open(rig.job([*range(12), 50 + key.stream_id], key=key))
        rig.worker.proceed(key, 0)
    for _ in range(3):
        await rig.step()
    ready = {
        key: [args[1:] for name, args, _ in rig.sender.calls if (name, args[0]) == ("ready", one)]
        for key, one in ((first, transfer(first)), (second, transfer(second)))
    }
    table = ready[first][-1][1]
    assert [end for end, _ in ready[first]] == [8, 13]
    assert ready[second][:2] == [(8, table[:2]), (12, table[:3])]
    assert [end for end, _ in ready[second]] == [8, 12, 13]
    assert ready[second][-1][1][:3] == table[:3]
    assert rig.sender.names().count("commit") == 2
    assert (rig.counted("computed"), rig.counted("cached")) == (13 + 1, 12)


async def test_request_that_ends_with_its_first_token_hands_nothing_over() -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job([1, 2, 3], most=1))
    rig.worker.proceed(KEY, 0)
    await rig.step()
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_LENGTH
    assert rig.sender.names()[-1] == "abort"
    assert "commit" not in rig.sender.names()
    rig.worker.freed(transfer(), "aborted")
    await rig.step()
    assert rig.referenced() == 0


@pytest.mark.parametrize("moment", ["waiting", "queued", "running", "leased"])
async def test_cancelled_job_gives_its_blocks_back_when_nobody_reads_them(moment: str) -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job(list(range(10))))
    steps = {"waiting": 0, "queued": 0, "running": 1, "leased": 2}[moment]
    if moment != "waiting":
        rig.worker.proceed(KEY, 0)
    for _ in range(steps):
        await rig.step()
    held = rig.referenced()
    rig.worker.cancel(KEY)
    rig.worker.cancel(KEY)
    await rig.step()
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_CANCELLED
    assert rig.referenced() == held
    if moment != "waiting":
        assert rig.sender.names()[-1] == "abort"
        rig.worker.freed(transfer(), "aborted")
        rig.worker.freed(transfer(), "aborted")
    await rig.step()
    assert rig.referenced() == 0
    assert rig.worker.idle


@pytest.mark.parametrize("outcome", ["lease_expired", "peer_lost", "abandoned"])
async def test_handoff_that_nobody_takes_frees_the_blocks_and_says_so(outcome: str) -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job([1, 2, 3]))
    rig.worker.proceed(KEY, 0)
    await rig.step()
    rig.worker.freed(transfer(), outcome)
    await rig.step()
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_FAILED
    assert outcome in rig.closed[KEY].error_message
    assert rig.referenced() == 0


async def test_peer_that_is_lost_during_prefill_stops_the_job() -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job(list(range(10))))
    rig.worker.proceed(KEY, 0)
    await rig.step()
    rig.worker.freed(transfer(), "peer_lost")
    await rig.step()
    assert rig.tokens == []
    assert rig.referenced() == 0
    assert rig.worker.idle


async def test_lost_session_ends_its_jobs_and_no_others() -> None:
    rig = PrefillRig()
    other = StreamKey(2, 6)
    for key in (KEY, other):
        rig.worker.open(rig.job([key.stream_id, 2, 3], key=key))
        rig.worker.proceed(key, 0)
    rig.worker.session_lost(1)
    await rig.step()
    assert [key for key, *_ in rig.tokens] == [other]


async def test_draining_worker_refuses_and_late_messages_do_nothing() -> None:
    rig = PrefillRig()
    rig.worker.proceed(KEY, 0)
    rig.worker.cancel(KEY)
    rig.worker.freed(TRANSFER, "released")
    rig.worker.drain()
    rig.worker.open(rig.job([1]))
    await rig.step()
    assert rig.closed[KEY].error_code == "draining"
    assert report_from(rig.outbox, b"", session=1).draining


@pytest.mark.parametrize("outcome", ["released", "lease_expired"])
async def test_draining_worker_waits_for_its_leases(outcome: str) -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job([1, 2, 3]))
    rig.worker.drain()
    rig.worker.proceed(KEY, 0)
    await rig.step()
    assert rig.sender.names()[-1] == "commit", "what was admitted is still computed"
    await rig.step()
    assert not rig.worker.idle, "decode may still read the blocks"
    rig.worker.freed(transfer(), outcome)
    await rig.step()
    assert rig.worker.idle
    assert rig.referenced() == 0


@pytest.mark.parametrize("moment", ["waiting", "queued", "running", "leased"])
async def test_job_that_outlasts_the_drain_is_failed_so_that_it_goes_on_elsewhere(
    moment: str,
) -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job(list(range(10))))
    if moment != "waiting":
        rig.worker.proceed(KEY, 0)
    for _ in range({"waiting": 0, "queued": 0, "running": 1, "leased": 2}[moment]):
        await rig.step()
    rig.worker.drain()
    rig.worker.fail_all(DrainingError("prefill-0 has gone away"))
    await rig.step()
    closed = rig.closed[KEY]
    assert (closed.reason, closed.error_code) == (pb.CLOSE_REASON_FAILED, "draining")
    if moment != "waiting":
        assert rig.sender.names()[-1] == "abort"
        assert not rig.worker.idle
        rig.worker.freed(transfer(), "aborted")
    await rig.step()
    assert rig.worker.idle
    assert rig.referenced() == 0


async def test_stream_id_in_use_changes_nothing_for_the_one_that_has_it() -> None:
    rig = PrefillRig()
    rig.worker.open(rig.job([1, 2, 3], most=1))
    rig.worker.open(rig.job([4, 5, 6]))
    rig.worker.proceed(KEY, 0)
    await rig.step()
    assert [key for key, *_ in rig.tokens] == [KEY]
    assert rig.closed[KEY].reason == pb.CLOSE_REASON_LENGTH


# ------------------------------------------------------------------------------ pulls

HELD, INPUT = 8, list(range(10))


async def pulling(rig: PrefillRig, *, tokens: list[int] = INPUT) -> PrefillJob:
    job = rig.job(tokens)
    job.lender = Lender("decode-0", "127.0.0.1:9")
    rig.worker.open(job)
    rig.worker.proceed(KEY, HELD)
    await rig.step()
    assert job.state is JobState.PULLING
    return job


async def test_pull_fills_the_jobs_own_blocks_and_the_rest_is_computed() -> None:
    rig = PrefillRig()
    rig.kv.pool.watch()
    job = await pulling(rig)
    [(name, args, options)] = rig.puller.calls
    assert (name, args) == ("begin", (transfer().way_back,))
    assert (options["start_token"], options["num_tokens"]) == (0, HELD)
    assert options["block_ids"] == job.sequence.block_table[:2]
    assert (options["address"], options["source_worker_id"]) == ("127.0.0.1:9", "decode-0")
    assert options["within_s"] > 0
    await rig.step()
    assert (rig.tokens, rig.cache) == ([], {}), "something was computed or published before READY"
    assert rig.outbox.standing.load.num_waiting_tokens == 2
    rig.worker.pulled(transfer().way_back, 1e9)
    await rig.step()
    assert rig.tokens == [(KEY, 0, 7)]
    assert rig.cache == dict.fromkeys(job.sequence.block_hashes[:2], True)
    assert (rig.counted("received"), rig.counted("computed")) == (HELD, 2)
    assert [args[1] for name, args, _ in rig.sender.calls if name == "ready"] == [10]
    rig.worker.freed(transfer(), "released")
    await rig.step()
    assert (rig.closed[KEY].num_received_tokens, rig.referenced()) == (HELD, 0)
    assert rig.worker.idle


async def test_input_that_decode_holds_whole_has_its_last_token_computed() -> None:
    rig = PrefillRig()
    job = await pulling(rig, tokens=list(range(8)))
    rig.worker.pulled(transfer().way_back, 1e9)
    assert job.sequence.num_remaining == 1
    assert job.sequence.num_shared_tokens == 8, "a block that others may read is written"
    await rig.step()
    assert (rig.counted("received"), rig.counted("computed")) == (7, 1)


async def test_others_are_computed_while_one_pulls() -> None:
    rig = PrefillRig()
    await pulling(rig)
    other = StreamKey(1, 6)
    rig.worker.open(rig.job([50, 51, 52], key=other))
    rig.worker.proceed(other, 0)
    await rig.step()
    assert [key for key, *_ in rig.tokens] == [other]


async def test_pull_that_fails_is_computed_into_other_blocks_and_not_tried_again() -> None:
    rig = PrefillRig()
    job = await pulling(rig)
    in_doubt = set(job.sequence.block_table[:2])
    rig.pulls.failed(transfer().way_back, 0.0)
    await rig.step()
    assert rig.kv.pool.counts().quarantined == 2
    assert not in_doubt & set(job.sequence.block_table)
    assert rig.puller.names() == ["begin"]
    await rig.step()
    assert rig.tokens == [(KEY, 0, 7)]
    assert rig.counted("computed") == 10
    rig.pulls.drained(transfer().way_back)
    rig.pulls.drained(transfer().way_back)
    rig.worker.pulled(transfer().way_back, 1e9)
    rig.worker.freed(transfer(), "released")
    await rig.step()
    assert (rig.kv.pool.counts().quarantined, rig.referenced(), rig.worker.idle) == (0, 0, True)


async def test_job_whose_pull_failed_waits_for_room_before_all_equals() -> None:
    rig = PrefillRig(num_blocks=4)
    await pulling(rig)
    other = StreamKey(1, 6)
    rig.worker.open(rig.job([50, 51, 52, 53, 54], key=other))
    rig.worker.proceed(other, 0)
    rig.pulls.failed(transfer().way_back, 0.0)
    await rig.step()
    assert rig.tokens == [], "the younger one went first"
    rig.pulls.drained(transfer().way_back)
    for _ in range(2):
        await rig.step()
    assert rig.tokens == [(KEY, 0, 7)]


@pytest.mark.parametrize("ending", ["cancel", "session_lost", "freed", "deadline", "fail_all"])
async def test_job_that_ends_while_it_pulls_keeps_its_blocks_in_quarantine(ending: str) -> None:
    rig = PrefillRig()
    job = await pulling(rig)
    if ending == "cancel":
        rig.worker.cancel(KEY)
    elif ending == "session_lost":
        rig.worker.session_lost(KEY.session)
    elif ending == "freed":
        rig.worker.freed(transfer(), "peer_lost")
    elif ending == "deadline":
        job.deadline = 0.0
    else:
        rig.worker.fail_all(DrainingError("it has gone away"))
    await rig.step()
    assert rig.puller.names() == ["begin", "cancel"]
    assert rig.kv.pool.counts().quarantined == 2
    assert not rig.worker.idle
    if ending != "freed":
        rig.worker.freed(transfer(), "aborted")
    rig.pulls.drained(transfer().way_back)
    await rig.step()
    assert (rig.kv.pool.counts().quarantined, rig.referenced(), rig.worker.idle) == (0, 0, True)


async def test_late_pull_counts_as_dearer_than_computing_and_a_refused_one_as_nothing() -> None:
    for waited_s, pays in ((0.0, True), (5.0, False)):
        rig = PrefillRig()
        job = await pulling(rig)
        began_at = rig.pulls._pulls[job.transfer.way_back].began_at
        rig.pulls.failed(job.transfer.way_back, began_at + waited_s)
        assert rig.pulls.costs.moving_pays(100, job.transfer.destination_epoch) is pays
        assert rig.pulls.costs.moving_pays(100, b"another process")
