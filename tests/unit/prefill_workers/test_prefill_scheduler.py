"""The prefill scheduler: order, chunks, and whole inputs or nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sequences import DOMAIN, pretend_step, sequence, small_cache

from baton.worker.session_server import StreamKey
from engine.intake import StopRule
from engine.kv_cache.kv_cache import KvCache
from kv_transfer.keys import TransferKey
from prefill_workers.scheduler import JobState, PrefillJob, PrefillScheduler


def job(number: int, tokens: list[int], priority: int = 0) -> PrefillJob:
    key = StreamKey(1, number)
    return PrefillJob(
        key=key,
        request_id=f"request-{number}",
        sequence=sequence(key, tokens),
        stop=StopRule(8, frozenset()),
        transfer=TransferKey(bytes([number]), 0, b"p", b"d"),
        deadline=1e9,
        priority=priority,
    )


def scheduler(kv: KvCache, *, budget: int = 8, most: int = 8) -> PrefillScheduler:
    return PrefillScheduler(kv, max_num_batched_tokens=budget, max_num_seqs=most)


def run(kv: KvCache, chosen: PrefillScheduler, arrivals: dict[int, list[PrefillJob]]) -> list[int]:
    """The numbers of the jobs in the order of their ends, by steps."""
    jobs = {job.sequence.key: job for arrived in arrivals.values() for job in arrived}
    ended: list[int] = []
    for step in range(1000):
        for arrived in arrivals.get(step, ()):
            chosen.enqueue(arrived)
        for done in pretend_step(kv, chosen.schedule()[0], 7):
            chosen.finish(jobs[done.key])
            ended.append(jobs[done.key].key.stream_id)
        if len(ended) == len(jobs):
            return ended
    raise AssertionError(f"only {ended} have ended")


def run_counting(
    kv: KvCache,
    chosen: PrefillScheduler,
    arrivals: dict[int, list[PrefillJob]],
    cancels: random.Random | None = None,
) -> dict[tuple[bytes, int], int]:
    """How often each token of each full block was computed, a cached input's last one left
    out. With ``cancels`` jobs end early, and give their blocks back when they end."""
    jobs = {job.sequence.key: job for arrived in arrivals.values() for job in arrived}
    announced: dict[object, list[int]] = {key: [] for key in jobs}
    num_computed: dict[tuple[bytes, int], int] = {}
    size = kv.layout.block_size

    def leave(ended: PrefillJob) -> None:
        chosen.remove(ended)
        kv.free(ended.sequence)
        del jobs[ended.sequence.key]

    for step in range(1000):
        for arrived in arrivals.get(step, ()):
            if arrived.sequence.key in jobs:
                chosen.enqueue(arrived)
        chunks, _ = chosen.schedule()
        kv.pool.check()
        for seq in (job.sequence for job in jobs.values() if job.state is JobState.RUNNING):
            table = seq.block_table[: seq.num_computed_tokens // size]
            before = announced[seq.key]
            assert table[: len(before)] == before, "a block that was announced is another"
            announced[seq.key] = table
        for chunk in chunks:
            begin = max(chunk.seq.num_computed_tokens, chunk.seq.num_shared_tokens)
            end = chunk.seq.num_computed_tokens + chunk.num_tokens
            hashes = DOMAIN.chain(chunk.seq.root_hash, chunk.seq.token_ids, size)
            for position in range(begin, min(end, len(hashes) * size)):
                token = hashes[position // size], position % size
                num_computed[token] = num_computed.get(token, 0) + 1
        assert chunks or not chosen.num_running, "jobs run, and none is computed"
        for done in pretend_step(kv, chunks, 7):
            chosen.finish(jobs[done.key])
            if cancels:
                leave(jobs[done.key])
        if cancels and jobs and cancels.random() < 0.1:
            leave(cancels.choice(list(jobs.values())))
        if all(job.state is JobState.LEASED for job in jobs.values()):
            return num_computed
    raise AssertionError("not every job has ended")


def test_short_job_is_computed_in_the_step_after_it_arrives_behind_a_long_one() -> None:
    kv = small_cache(64)
    chosen = scheduler(kv, budget=8)
    long, short = job(1, list(range(100))), job(2, [200, 201, 202])
    chosen.enqueue(long)
    pretend_step(kv, chosen.schedule()[0], 7)
    chosen.enqueue(short)
    chunks, _ = chosen.schedule()
    assert [(c.seq, c.num_tokens) for c in chunks] == [(long.sequence, 5), (short.sequence, 3)]


def test_long_job_ends_at_half_speed_though_short_ones_never_cease() -> None:
    kv = small_cache(400)
    arrivals = {step: [job(step + 1, [1000 + step] * 8)] for step in range(1, 30)}
    arrivals[0] = [job(1, list(range(80)))]
    ended = run(kv, scheduler(kv, budget=8, most=64), arrivals)
    # Half of 8 tokens in each of 20 steps; beside it a short one ends every other step.
    assert ended.index(1) <= 10
    assert len(ended) == 30


def test_short_job_does_not_pass_a_long_one_that_waits_for_blocks() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    one, long, short = job(1, list(range(16))), job(2, list(range(50, 70))), job(3, [1])
    for each in (one, long, short):
        chosen.enqueue(each)
    _, admitted = chosen.schedule()
    assert admitted == [one]
    assert (long.state, short.state) == (JobState.QUEUED, JobState.QUEUED)


def test_jobs_begin_in_order_of_priority_and_equal_ones_of_arrival() -> None:
    kv = small_cache(64)
    chosen = scheduler(kv, most=1)
    jobs = [job(n, [n], priority) for n, priority in enumerate((5, 0, 5, -3, 0))]
    assert run(kv, chosen, {0: jobs}) == [3, 1, 4, 0, 2]


def test_better_priority_passes_a_job_that_waits_for_blocks_and_takes_none_from_who_runs() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    running, waiting = job(1, list(range(20)), 5), job(2, list(range(50, 66)))
    chosen.enqueue(running)
    chosen.schedule()
    chosen.enqueue(waiting)
    assert chosen.schedule()[1] == []
    worse, better, best = job(3, [1], 1), job(4, [90] * 8, -1), job(5, [80] * 8, -2)
    for each in (worse, better, best):
        chosen.enqueue(each)
    assert chosen.schedule()[1] == [best]
    assert (running.state, better.state, worse.state) == (
        JobState.RUNNING,
        JobState.QUEUED,
        JobState.QUEUED,
    )


def test_best_priority_has_half_a_step_and_the_shortest_job_the_other() -> None:
    kv = small_cache(128)
    chosen = scheduler(kv, budget=10)
    jobs = [job(1, list(range(100)), 7), job(2, [200, 201], 7), job(3, list(range(300, 400)))]
    for each in jobs:
        chosen.enqueue(each)
        chosen.schedule()
    assert [each.state for each in jobs] == [JobState.RUNNING] * 3
    chunks, _ = chosen.schedule()
    assert [(c.seq, c.num_tokens) for c in chunks] == [
        (jobs[2].sequence, 8),
        (jobs[1].sequence, 2),
    ]


def test_best_priority_is_slowed_at_most_twofold_by_worse_short_ones() -> None:
    kv = small_cache(400)
    arrivals = {step: [job(step + 1, [1000 + step] * 8, 1)] for step in range(30)}
    arrivals[3].append(job(99, list(range(80))))
    ended = run(kv, scheduler(kv, budget=8, most=64), arrivals)
    # It takes 20 steps, of half a budget each; a short one ends in every other of them.
    assert ended.index(99) <= 13


def test_waiting_job_counts_as_work_and_takes_nothing() -> None:
    kv = small_cache(32)
    chosen = scheduler(kv)
    one = job(1, list(range(8)))
    chosen.enqueue(one)
    pretend_step(kv, chosen.schedule()[0], 7)
    chosen.finish(one)
    before = kv.pool.counts()
    waiting = job(2, [*range(8), 90, 91])
    chosen.add(waiting)
    assert (chosen.num_tokens_to_compute, chosen.num_queued, waiting.state) == (
        2,
        0,
        JobState.WAITING,
    )
    assert kv.pool.counts() == before
    assert chosen.schedule() == ([], [])
    chosen.enqueue(waiting)
    assert chosen.num_tokens_to_compute == 2
    gone = job(3, [50, 51])
    chosen.add(gone)
    chosen.remove(gone)
    assert chosen.num_tokens_to_compute == 2


def test_chunks_fill_the_budget_and_alike_jobs_come_first_come_first_served() -> None:
    kv = small_cache(32)
    chosen = scheduler(kv, budget=8)
    one, two = job(1, list(range(11))), job(2, list(range(50, 61)))
    chosen.enqueue(one)
    chosen.enqueue(two)
    seen = []
    for _ in range(3):
        chunks, _ = chosen.schedule()
        seen.append([(c.seq, c.num_tokens) for c in chunks])
        for done in pretend_step(kv, chunks, 7):
            chosen.finish(one if done is one.sequence else two)
    assert seen == [
        [(one.sequence, 8)],
        [(one.sequence, 3), (two.sequence, 5)],
        [(two.sequence, 6)],
    ]
    assert (one.state, two.state) == (JobState.LEASED, JobState.LEASED)


def test_tokens_to_compute_leave_out_what_the_cache_holds() -> None:
    kv = small_cache(32)
    chosen = scheduler(kv, budget=8)
    one = job(1, list(range(8)))
    chosen.enqueue(one)
    assert chosen.num_tokens_to_compute == 8
    chunks, _ = chosen.schedule()
    pretend_step(kv, chunks, 7)
    chosen.finish(one)
    same, longer, other = job(2, list(range(8))), job(3, list(range(11))), job(4, [90] * 5)
    for waiting, expected in ((same, 1), (longer, 1 + 3), (other, 1 + 3 + 5)):
        chosen.enqueue(waiting)
        assert chosen.num_tokens_to_compute == expected
    chosen.schedule()  # now they run: what is left of them counts
    assert chosen.num_tokens_to_compute == 1 + 3 + 5


def test_job_starts_only_when_its_whole_input_has_room() -> None:
    kv = small_cache(5)
    chosen = scheduler(kv)
    one, two = job(1, list(range(16))), job(2, list(range(50, 58)))
    chosen.enqueue(one)
    chosen.enqueue(two)
    _, admitted = chosen.schedule()
    assert admitted == [one]
    assert two.state is JobState.QUEUED
    assert two.sequence.block_table == []
    chosen.remove(one)
    kv.free(one.sequence)
    _, admitted = chosen.schedule()
    assert admitted == [two]


def test_cached_prefix_is_not_computed_again() -> None:
    kv = small_cache(16)
    chosen = scheduler(kv, budget=64)
    one = job(1, list(range(10)))
    chosen.enqueue(one)
    pretend_step(kv, chosen.schedule()[0], 7)
    chosen.finish(one)
    kv.free(one.sequence)
    two = job(2, [*range(8), 99])
    chosen.enqueue(two)
    chunks, _ = chosen.schedule()
    assert [(c.seq, c.num_tokens) for c in chunks] == [(two.sequence, 1)]
    assert two.sequence.num_shared_tokens == 8


@pytest.mark.parametrize("gap", [0, 1, 4, 9])
def test_common_part_of_jobs_that_arrive_together_is_computed_once(gap: int) -> None:
    kv = small_cache(400)
    document = list(range(128))
    jobs = [job(number, [*document, 200 + number]) for number in range(8)]
    arrivals: dict[int, list[PrefillJob]] = {}
    for number, each in enumerate(jobs):
        arrivals.setdefault(number * gap, []).append(each)
    num_computed = run_counting(kv, scheduler(kv, budget=16), arrivals)
    assert sum(num_computed.values()) == 128
    assert max(num_computed.values()) == 1
    assert [each.sequence.num_cached_tokens for each in jobs] == [0] + [128] * 7


Drawn = tuple[int, int, int, int, int]
PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 6),  # blocks of the document that all begin with
        st.integers(0, 2),  # which of three goes on from there
        st.integers(1, 14),  # for how many tokens
        st.integers(0, 6),  # the step that it arrives in
        st.integers(0, 2),  # its priority
    ),
    min_size=1,
    max_size=10,
)


def prompts(drawn: list[Drawn]) -> dict[int, list[PrefillJob]]:
    arrivals: dict[int, list[PrefillJob]] = {}
    for number, (num_common, branch, num_own, step, priority) in enumerate(drawn):
        tokens = [*range(num_common * 4), *([1000 + branch] * num_own)]
        arrivals.setdefault(step, []).append(job(number, tokens, priority))
    return arrivals


@given(drawn=PROMPTS, budget=st.integers(1, 24))
def test_no_full_block_is_computed_twice(drawn: list[Drawn], budget: int) -> None:
    kv = small_cache(400)
    num_computed = run_counting(kv, scheduler(kv, budget=budget, most=16), prompts(drawn))
    assert set(num_computed.values()) <= {1}


@given(drawn=PROMPTS, budget=st.integers(1, 24), seed=st.integers(0, 99))
def test_every_job_ends_whatever_is_cancelled_and_evicted(
    drawn: list[Drawn], budget: int, seed: int
) -> None:
    kv = small_cache(24)
    drawn_by = random.Random(seed)
    run_counting(kv, scheduler(kv, budget=budget), prompts(drawn), drawn_by)
    counts = kv.pool.counts()
    assert (counts.referenced, counts.quarantined) == (0, 0)


@pytest.mark.parametrize("running", [False, True])
def test_removed_job_is_in_no_list(running: bool) -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    one = job(1, [1, 2, 3])
    chosen.enqueue(one)
    if running:
        chosen.schedule()
    chosen.remove(one)
    assert (chosen.num_queued, chosen.num_running, chosen.num_tokens_to_compute) == (0, 0, 0)
    assert chosen.schedule() == ([], [])


def test_no_more_jobs_run_than_allowed() -> None:
    kv = small_cache(32)
    chosen = scheduler(kv, most=2)
    jobs = [job(n, [n]) for n in range(4)]
    for item in jobs:
        chosen.enqueue(item)
    _, admitted = chosen.schedule()
    assert admitted == jobs[:2]
    assert (chosen.num_running, chosen.num_queued) == (2, 2)
