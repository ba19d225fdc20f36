"""Which workers a choice goes to."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import cast

import pytest

from baton.config import RoutingConfig, SessionConfig
from baton.protocol import new_epoch
from baton.records import Role
from baton.v1 import session_pb2 as pb
from router.routing.input_hashes import BLOCKS_AT_ONCE, BlockNames, InputHashes
from router.routing.kv_aware import BALANCE_HALF_LIFE_S, KvAware
from router.routing.kv_index import KvIndex
from router.routing.policy import NoPeers, Pairing, RoutingPolicy, make_policy
from router.routing.simple_policies import least_loaded, round_robin, uniformly_random
from router.workers.handshake import Call
from router.workers.session import WorkerSession
from tests.support.fake_worker import worker_record

NAMES = BlockNames(secret="secret", weights_revision="revision")
SIZE = 16
ALL = ("kv_aware", "round_robin", "least_loaded", "random")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Sessions that nobody runs, an index, and a clock, in the test's hands."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.index = KvIndex(self.clock)
        self._number = 0

    def add(self, role: Role, *, digest: str = "one", generation: str = "0") -> WorkerSession:
        self._number += 1
        record = worker_record(f"{role}-{self._number}", role, new_epoch()).model_copy(
            update={"digest": digest, "generation": generation}
        )
        call = cast(Call, None)
        session = WorkerSession(record, call, SessionConfig(), kv_dtype="float32", index=self.index)
        self.index.join(session.epoch, num_blocks=record.num_blocks)
        self.index.take(session.epoch, pb.CacheEvents(sequence=1, snapshot=True))
        return session

    def several(self, role: Role, number: int, **facts: str) -> list[WorkerSession]:
        return [self.add(role, **facts) for _ in range(number)]

    def hold(self, session: WorkerSession, hashes: Sequence[bytes]) -> None:
        """The next event of the worker adds these."""
        sequence = self.index._parts[session.epoch].sequence + 1
        events = pb.CacheEvents(sequence=sequence, added=b"".join(hashes))
        assert not self.index.take(session.epoch, events)

    def policy(self, name: str, seed: int = 0, **weights: float) -> RoutingPolicy:
        config = RoutingConfig.model_validate({"policy": name, **weights})
        return make_policy(config, self.index, random.Random(seed), self.clock)


def report(
    session: WorkerSession, *, num_running: int = 0, num_tokens: int = 0, num_blocks: int = 0
) -> None:
    session.report = pb.Report(
        num_running=num_running,
        num_waiting_tokens=num_tokens,
        blocks=pb.BlockCounts(referenced=num_blocks),
    )


def input_of(*workers: WorkerSession, num_tokens: int = 10 * SIZE, first: int = 0) -> InputHashes:
    hashes = InputHashes(NAMES, cache_salt="")
    asyncio.run(hashes.prepare([first, *range(1, num_tokens)], workers))
    return hashes


def pick(
    policy: RoutingPolicy,
    prefill: Sequence[WorkerSession],
    decode: Sequence[WorkerSession],
    input_: InputHashes | None = None,
) -> Pairing:
    pairing = policy.pick(input_ or input_of(*prefill, *decode), prefill, decode)
    assert pairing is not None
    return pairing


# -------------------------------------------------------------- every policy


@pytest.mark.parametrize("name", ALL)
def test_no_decode_worker_is_no_pairing(name: str) -> None:
    workers = Workers()
    prefill = workers.several("prefill", 1)
    assert workers.policy(name).pick(input_of(*prefill), prefill, []) is None


@pytest.mark.parametrize("name", ALL)
def test_no_prefill_worker_leaves_decode_alone(name: str) -> None:
    workers = Workers()
    decode = workers.several("decode", 1)
    assert pick(workers.policy(name), [], decode) == Pairing(None, decode[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("differing", [{"digest": "other"}, {"generation": "1"}])
def test_only_equal_digests_and_generations_pair_whatever_else_says(
    name: str, differing: dict[str, str]
) -> None:
    workers = Workers()
    prefill = [workers.add("prefill", **differing), workers.add("prefill")]
    decode = [workers.add("decode"), workers.add("decode", digest="third")]
    report(prefill[1], num_running=50, num_tokens=10_000)
    report(decode[0], num_running=50, num_blocks=90)
    policy = workers.policy(name)
    for _ in range(5):
        assert pick(policy, prefill, decode) == Pairing(prefill[1], decode[0])


# -------------------------------------------------- policies that know no blocks


def test_least_loaded_takes_the_fewest_sequences_on_each_side() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 3), workers.several("decode", 2)
    for session, num_running in zip([*prefill, *decode], (3, 1, 2, 9, 4), strict=True):
        report(session, num_running=num_running)
    assert pick(least_loaded(random.Random(0), NoPeers()), prefill, decode) == Pairing(
        prefill[1], decode[1]
    )


def test_least_loaded_draws_among_equal_workers() -> None:
    workers = Workers()
    decode = workers.several("decode", 3)
    report(decode[2], num_running=1)
    drawn = {pick(least_loaded(random.Random(n), NoPeers()), [], decode).decode for n in range(40)}
    assert drawn == {decode[0], decode[1]}


def test_round_robin_gives_everybody_a_turn_and_newcomers_theirs() -> None:
    workers = Workers()
    policy = round_robin(NoPeers())
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 3)
    picked = [pick(policy, prefill, decode) for _ in range(6)]
    assert Counter(pair.decode for pair in picked) == dict.fromkeys(decode, 2)
    assert Counter(pair.prefill for pair in picked) == dict.fromkeys(prefill, 3)
    newcomer = workers.add("decode")
    assert pick(policy, prefill, [*decode, newcomer]).decode is newcomer
    assert pick(policy, prefill, [*decode, newcomer]).decode is decode[0]


def test_random_takes_everybody() -> None:
    workers = Workers()
    policy = uniformly_random(random.Random(0), NoPeers())
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    assert len({pick(policy, prefill, decode) for _ in range(60)}) == 4


# ------------------------------------------------------------------- kv_aware


def test_the_workers_that_hold_the_prefix_are_chosen_together() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 3), workers.several("decode", 3)
    input_ = input_of(*prefill)
    hashes = input_.of(prefill[0])
    assert len(hashes) == 10
    workers.hold(prefill[0], hashes[:3])
    workers.hold(prefill[2], hashes[:4])
    workers.hold(decode[1], hashes[:5])
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
    workers.hold(decode[0], input_.of(decode[0]))  # saves 10 × 0.25
    report(decode[0], num_blocks=10)
    policy = workers.policy("kv_aware", decode_block_weight=weight, transfer_weight=0.25)
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


def test_a_decision_counts_as_load_until_the_next_report() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    policy = workers.policy("kv_aware")
    pairs = [pick(policy, prefill, decode, input_of(*prefill, first=n)) for n in range(8)]
    assert Counter(pair.prefill for pair in pairs) == dict.fromkeys(prefill, 4)
    assert Counter(pair.decode for pair in pairs) == dict.fromkeys(decode, 4)
    assert isinstance(policy, KvAware)
    workers.clock.now += 100 * BALANCE_HALF_LIFE_S
    empty = input_of(*prefill, num_tokens=1)
    assert policy._standing(empty, prefill[0], 0).num_waiting == 4 * 10 * SIZE
    assert policy._standing(empty, decode[0], 0).num_in_use == 4 * 10 * SIZE
    report(prefill[0], num_tokens=5)
    report(decode[0], num_blocks=2)
    assert policy._standing(empty, prefill[0], 0).num_waiting == 5
    assert policy._standing(empty, decode[0], 0).num_in_use == 2 * SIZE


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


# --------------------------------------------------------------- input hashes


async def test_input_is_named_as_workers_name_it_and_grows_by_what_was_emitted() -> None:
    session = Workers().add("prefill")
    tokens = list(range(3 * SIZE + 5))
    hashes = InputHashes(NAMES, cache_salt="tenant")
    await hashes.prepare(tokens, [session])
    domain = NAMES.domain("float32")
    root = domain.root(cache_salt="tenant")
    assert hashes.of(session) == domain.chain(root, tokens, SIZE)
    tokens += range(100, 100 + SIZE)
    await hashes.prepare(tokens, [session])
    assert hashes.of(session) == domain.chain(root, tokens, SIZE)
    assert hashes.num_tokens == len(tokens)


async def test_a_long_input_lets_others_have_their_turn() -> None:
    session = Workers().add("prefill")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await InputHashes(NAMES).prepare(range(4 * BLOCKS_AT_ONCE * SIZE), [session])
    task.cancel()
    assert turns >= 3


async def test_policies_that_do_not_ask_have_nothing_hashed() -> None:
    session = Workers().add("prefill")
    hashes = InputHashes(None)
    await hashes.prepare(range(100), [session])
    assert hashes.of(session) == ()
    assert hashes.num_tokens == 100
