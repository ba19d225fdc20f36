"""The policy that weighs what workers hold against what they have to do."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from baton.v1 import session_pb2 as pb
from router.routing.input_hashes import InputHashes
from router.routing.kv_aware import BALANCE_HALF_LIFE_S, MAX_CANDIDATES, KvAware
from router.routing.kv_index import EXPECT_S
from router.routing.policy import Candidate, Pairing, PeerShare, RoutingPolicy
from router.workers.session import WorkerSession
from tests.support.routing import (
    NAMES,
    SIZE,
    Peers,
    Unheard,
    Workers,
    input_of,
    open_on,
    pick,
    report,
)


def test_the_workers_that_hold_the_prefix_are_chosen_together() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 3), workers.several("decode", 3)
    input_ = input_of(*prefill)
    hashes = input_.of(prefill[0])
    assert len(hashes) == 10
    workers.hold(prefill[0], hashes[:3])
    workers.hold(prefill[2], hashes[:4])
    workers.hold(decode[1], hashes[:4])
    workers.hold(decode[0], hashes[6:])
    pairing = pick(workers.policy("kv_aware"), prefill, decode, input_)
    assert pairing == Pairing(prefill[2], decode[1])


def test_a_longer_queue_outweighs_a_held_prefix() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 1)
    input_ = input_of(*prefill)
    workers.hold(prefill[0], input_.of(prefill[0])[:4])
    report(prefill[0], num_tokens=4 * SIZE - 1)
    policy = workers.policy("kv_aware")
    assert pick(policy, prefill, decode, input_).prefill is prefill[0]
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 1)
    workers.hold(prefill[0], input_.of(prefill[0])[:4])
    report(prefill[0], num_tokens=4 * SIZE + 1)
    assert pick(workers.policy("kv_aware"), prefill, decode, input_).prefill is prefill[1]


@pytest.mark.parametrize(("weight", "chosen"), [(0.1, 0), (0.5, 1)])
def test_blocks_in_use_are_weighed_against_what_would_be_moved(weight: float, chosen: int) -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 1), workers.several("decode", 2)
    input_ = input_of(*prefill)
    workers.hold(prefill[0], input_.of(prefill[0]))
    workers.hold(decode[0], input_.of(decode[0]))  # saves 10 × 0.25
    report(decode[0], num_blocks=10)
    weights = {"decode_block_weight": weight, "transfer_weight": 0.25}
    policy = workers.policy("kv_aware", local_prefill_max_tokens=0, **weights)
    assert pick(policy, prefill, decode, input_).decode is decode[chosen]


def test_decode_alone_computes_what_it_misses() -> None:
    workers = Workers()
    decode = workers.several("decode", 2)
    input_ = input_of(*decode)
    workers.hold(decode[1], input_.of(decode[1])[:2])
    policy = workers.policy("kv_aware", transfer_weight=0.0)
    assert pick(policy, [], decode, input_).decode is decode[1]


def test_equal_pairs_are_drawn_among() -> None:
    drawn = set()
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    for seed in range(60):
        drawn.add(pick(workers.policy("kv_aware", seed), prefill, decode, input_of()))
    assert len(drawn) == 4


def opened_eight() -> tuple[Workers, KvAware, list[WorkerSession], list[WorkerSession]]:
    """Four streams of ten blocks on each of two prefill and two decode workers."""
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    policy, pairs = workers.policy("kv_aware"), []
    for first in range(8):
        pairs.append(pick(policy, prefill, decode, input_of(*prefill, first=first)))
        open_on(pairs[-1])
    assert Counter(pair.prefill for pair in pairs) == dict.fromkeys(prefill, 4)
    assert Counter(pair.decode for pair in pairs) == dict.fromkeys(decode, 4)
    assert isinstance(policy, KvAware)
    workers.clock.now += 100 * BALANCE_HALF_LIFE_S
    return workers, policy, prefill, decode


EMPTY = input_of(num_tokens=1)


def test_an_open_counts_as_load_until_a_report_includes_it() -> None:
    _, policy, prefill, decode = opened_eight()
    for num_opens in range(5):
        num_beyond = 4 - num_opens
        report(prefill[0], num_tokens=5, num_opens=num_opens)
        report(decode[0], num_blocks=2, num_opens=num_opens)
        standing = policy._standing(EMPTY, prefill[0], 0)
        assert standing.num_waiting == 5 + num_beyond * 10 * SIZE
        standing = policy._standing(EMPTY, decode[0], 0)
        assert (standing.num_waiting, standing.num_in_use) == (0, (2 + num_beyond * 10) * SIZE)


def test_a_decision_that_no_open_follows_counts_for_nothing() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 1), workers.several("decode", 1)
    policy = workers.policy("kv_aware")
    assert isinstance(policy, KvAware)
    pick(policy, prefill, decode)
    assert policy._standing(EMPTY, prefill[0], 0).num_waiting == 0
    short = input_of(*prefill, num_tokens=2 * SIZE, first=9)
    open_on(pick(policy, prefill, decode, short))
    prefill[0].open(pb.Open(stream_id=0), Unheard())
    assert policy._standing(EMPTY, prefill[0], 0).num_waiting == 2 * SIZE


@pytest.mark.parametrize("includes", [False, True])
@pytest.mark.parametrize("how", ["token", "closed", "cancelled"])
def test_an_open_counts_no_longer_than_its_work(how: str, includes: bool) -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 1), workers.several("decode", 1)
    policy = workers.policy("kv_aware")
    assert isinstance(policy, KvAware)
    stream_id = open_on(pick(policy, prefill, decode))
    for session in (*prefill, *decode):
        report(session, num_opens=int(includes))
        if how == "cancelled":
            session.cancel(stream_id)
        elif how == "closed":
            session._take_events(pb.Events(closed=[pb.Closed(stream_id=stream_id)]))
        else:
            batch = pb.TokenBatch(stream_ids=[stream_id] * 2, positions=[0, 1], token_ids=[7, 8])
            session._take_events(pb.Events(tokens=batch))
    assert policy._standing(EMPTY, prefill[0], 0).num_waiting == 0
    in_use = 10 * SIZE if how == "token" and not includes else 0
    assert policy._standing(EMPTY, decode[0], 0).num_in_use == in_use
    for session in (*prefill, *decode):
        report(session)
        assert session.given.num_sequences == int(how == "token")


def test_a_decision_makes_the_same_prefix_go_the_same_way_before_any_event() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 4), workers.several("decode", 4)
    policy = workers.policy("kv_aware", decode_block_weight=0.0)
    first = pick(policy, prefill, decode)
    for session in (*prefill, *decode):
        report(session)
    workers.clock.now += 1.0
    assert pick(policy, prefill, decode) == first


def test_a_short_prefix_that_all_share_does_not_pin_one_worker() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    policy = workers.policy("kv_aware")
    used = Counter[WorkerSession | None]()
    for user in range(20):
        input_ = InputHashes(NAMES)
        tokens = [*range(SIZE), *[1000 + user] * 9 * SIZE]
        asyncio.run(input_.prepare(tokens, prefill))
        pair = pick(policy, prefill, decode, input_)
        used.update([pair.prefill, pair.decode])
        for session in (*prefill, *decode):
            report(session)
        workers.clock.now += 1.0
    assert min(used[session] for session in (*prefill, *decode)) >= 7


def test_what_other_gateways_gave_a_worker_counts_as_its_load() -> None:
    workers, peers = Workers(), Peers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    prefill[0].load_at = 5.0
    peers.shares = {
        prefill[0].epoch: PeerShare(num_tokens=1),
        decode[1].epoch: PeerShare(num_blocks=1),
    }
    for seed in range(10):
        one_of_many = workers.policy("kv_aware", seed, peers)
        assert pick(one_of_many, prefill, decode) == Pairing(prefill[1], decode[0])
        workers.clock.now += EXPECT_S
    assert peers.asked[prefill[0].epoch] == 5.0
    assert peers.asked[decode[0].epoch] is None


# -------------------------------------------------------------- local prefill


def local_case(
    *, num_held: int = 8, max_tokens: int = 32, **weights: float
) -> tuple[Workers, RoutingPolicy, list[WorkerSession], list[WorkerSession], InputHashes]:
    """Ten blocks of input, of which the second decode worker holds ``num_held``."""
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    input_ = input_of(*prefill)
    workers.hold(decode[1], input_.of(decode[1])[:num_held])
    policy = workers.policy("kv_aware", local_prefill_max_tokens=max_tokens, **weights)
    return workers, policy, prefill, decode, input_


def test_a_decode_worker_prefills_the_little_that_it_lacks() -> None:
    _, policy, prefill, decode, input_ = local_case()
    assert pick(policy, prefill, decode, input_) == Pairing(None, decode[1])


@pytest.mark.parametrize(
    ("num_held", "num_held_by_prefill", "max_tokens", "is_local"),
    [
        (4, 3, 6 * SIZE, True),  # lacks few, and less than they
        (4, 3, 6 * SIZE - 1, False),  # more, and not half as many as they
        (7, 3, 1 * SIZE, True),  # not few, and less than half as many as they
        (5, 0, 2 * SIZE, True),  # just half as many
        (5, 1, 2 * SIZE, False),
        (8, 0, SIZE // 2, True),  # four times as many as are few
        (8, 0, SIZE // 2 - 1, False),
    ],
)
def test_few_tokens_are_prefilled_locally_and_some_more_where_prefill_lacks_twice_as_many(
    num_held: int, num_held_by_prefill: int, max_tokens: int, is_local: bool
) -> None:
    workers, policy, prefill, decode, input_ = local_case(num_held=num_held, max_tokens=max_tokens)
    workers.hold(prefill[0], input_.of(prefill[0])[:num_held_by_prefill])
    assert (pick(policy, prefill, decode, input_).prefill is None) == is_local


def test_a_decode_worker_that_waits_for_a_prompt_does_not_compute_it_as_well() -> None:
    _, policy, prefill, decode, _ = local_case(max_tokens=2 * SIZE)
    fresh = input_of(*prefill, num_tokens=50 * SIZE, first=7)
    for _ in range(3):
        pairing = pick(policy, prefill, decode, fresh)
        assert pairing.prefill in prefill
        open_on(pairing)


def test_at_0_nothing_is_prefilled_locally_even_where_decode_holds_it_all() -> None:
    _, policy, prefill, decode, input_ = local_case(num_held=10, max_tokens=0)
    assert pick(policy, prefill, decode, input_).prefill in prefill
    _, policy, prefill, decode, input_ = local_case(num_held=10, max_tokens=1)
    assert pick(policy, prefill, decode, input_) == Pairing(None, decode[1])


@pytest.mark.parametrize(("num_held", "is_local"), [(7, True), (8, False), (10, False)])
def test_a_decode_worker_goes_on_alone_where_it_holds_more_than_every_prefill_worker(
    num_held: int, is_local: bool
) -> None:
    workers, policy, prefill, decode, input_ = local_case()
    workers.hold(prefill[0], input_.of(prefill[0])[:num_held])
    alone, pair = Pairing(None, decode[1]), Pairing(prefill[0], decode[1])
    assert pick(policy, prefill, decode, input_) == (alone if is_local else pair)


@pytest.mark.parametrize("num_tokens", [1, SIZE, 10 * SIZE])
def test_a_fresh_input_goes_to_a_prefill_worker_that_is_free_however_short(num_tokens: int) -> None:
    _, policy, prefill, decode, _ = local_case(max_tokens=10_000)
    fresh = input_of(*prefill, num_tokens=num_tokens, first=7)
    report(prefill[0], num_tokens=1000)
    assert pick(policy, prefill, decode, fresh).prefill is prefill[1]


def test_a_short_input_does_not_wait_for_busy_prefill_workers() -> None:
    _, policy, prefill, decode, _ = local_case(max_tokens=2 * SIZE)
    for session in prefill:
        report(session, num_tokens=1000)
    short, long = (input_of(*prefill, num_tokens=n * SIZE, first=10 * n) for n in (2, 3))
    assert pick(policy, prefill, decode, short).prefill is None
    assert pick(policy, prefill, decode, long).prefill in prefill


@pytest.mark.parametrize(("num_running", "is_local"), [(1, True), (40, False)])
def test_the_streams_that_local_prefill_would_disturb_count(
    num_running: int, is_local: bool
) -> None:
    _, policy, prefill, decode, input_ = local_case()
    report(decode[1], num_running=num_running)
    assert (pick(policy, prefill, decode, input_).prefill is None) == is_local


@pytest.mark.parametrize(("num_tokens", "is_local"), [(10, True), (200, False)])
def test_what_waits_on_decode_counts_against_local_prefill(num_tokens: int, is_local: bool) -> None:
    _, policy, prefill, decode, input_ = local_case()
    report(decode[1], num_tokens=num_tokens)
    assert (pick(policy, prefill, decode, input_).prefill is None) == is_local


def test_local_prefill_counts_as_waiting_on_decode_and_as_nothing_on_prefill() -> None:
    _, policy, prefill, decode, input_ = local_case()
    open_on(pick(policy, prefill, decode, input_))
    assert isinstance(policy, KvAware)
    empty = input_of(*prefill, num_tokens=1)
    assert policy._standing(empty, decode[1], 0).num_waiting == 2 * SIZE
    assert [policy._standing(empty, each, 0).num_waiting for each in prefill] == [0, 0]


# ---------------------------------------------------------------- candidates


def test_the_candidates_are_the_cheapest_in_order_and_the_first_is_chosen() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 4), workers.several("decode", 4)
    for number, session in enumerate((*prefill, *decode)):
        report(session, num_tokens=number, num_blocks=number)
    pairing = pick(workers.policy("kv_aware"), prefill, decode)
    costs = [candidate.cost for candidate in pairing.candidates]
    assert len(costs) == MAX_CANDIDATES
    assert costs == sorted(costs)
    first = pairing.candidates[0]
    assert pairing.prefill is not None
    assert first.prefill == pairing.prefill.record.worker_id == prefill[0].record.worker_id
    assert first.decode == pairing.decode.record.worker_id == decode[0].record.worker_id


def test_local_prefill_is_a_candidate_without_a_prefill_worker() -> None:
    _, policy, prefill, decode, input_ = local_case(transfer_weight=0.25)
    pairing = pick(policy, prefill, decode, input_)
    assert pairing.candidates[0] == Candidate(None, decode[1].record.worker_id, 2 * SIZE)
    computed, pulled, handed_over = 2 * SIZE, 8 * SIZE, 2 * SIZE
    assert pairing.candidates[1].cost == computed + 0.25 * (pulled + handed_over)
    assert len(pairing.candidates) == 5


# ------------------------------------------------------------------------------ pulls


def second_turn() -> tuple[Workers, list[WorkerSession], list[WorkerSession], InputHashes]:
    """The first prefill worker has prompt and nothing of the answer; the last decode worker
    has both."""
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    input_ = input_of(*prefill)
    workers.hold(prefill[0], input_.of(prefill[0])[:2])
    workers.hold(decode[1], input_.of(decode[1])[:9])
    return workers, prefill, decode, input_


@pytest.mark.parametrize(("pulls", "cost"), [(1, 1 + 0.25 * 7), (0, 8)])
def test_what_decode_lends_costs_as_much_as_moving_it(pulls: int, cost: float) -> None:
    workers, prefill, decode, input_ = second_turn()
    policy = workers.policy("kv_aware", local_prefill_max_tokens=0, prefill_pulls=pulls)
    pairing = pick(policy, prefill, decode, input_)
    assert pairing == Pairing(prefill[0], decode[1], pairing.candidates)
    assert pairing.candidates[0].cost == (cost + 0.25 * 1) * SIZE


def test_prefill_worker_that_holds_less_is_chosen_where_the_other_is_busy_and_may_pull() -> None:
    for pulls, chosen in ((1, 1), (0, 0)):
        workers, prefill, decode, input_ = second_turn()
        report(prefill[0], num_tokens=SIZE)
        policy = workers.policy("kv_aware", local_prefill_max_tokens=0, prefill_pulls=pulls)
        assert pick(policy, prefill, decode, input_) == Pairing(prefill[chosen], decode[1])


def test_what_is_pulled_is_no_work_for_the_prefill_worker() -> None:
    workers, prefill, decode, input_ = second_turn()
    peers = Peers()
    policy = workers.policy("kv_aware", peers=peers, local_prefill_max_tokens=0)
    pick(policy, prefill, decode, input_)
    assert [num_tokens for _, num_tokens, _ in peers.told] == [SIZE, 0]


def test_decode_worker_that_holds_nearly_all_still_prefills_the_rest_by_itself() -> None:
    workers, prefill, decode, input_ = second_turn()
    assert pick(workers.policy("kv_aware"), prefill, decode, input_) == Pairing(None, decode[1])
