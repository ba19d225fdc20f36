"""Which workers a choice goes to, whatever the policy, and by policies that know no blocks."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from router.routing.policy import NoPeers, Pairing, PeerShare
from router.routing.simple_policies import least_loaded, round_robin, uniformly_random
from tests.support.routing import ALL, SIZE, Peers, Workers, input_of, pick, report


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
    policy = workers.policy(name, local_prefill_max_tokens=0)
    for _ in range(5):
        assert pick(policy, prefill, decode) == Pairing(prefill[1], decode[0])


def test_a_decode_worker_without_a_partner_stays_out_while_another_has_one() -> None:
    workers = Workers()
    prefill = [workers.add("prefill")]
    decode = [workers.add("decode"), workers.add("decode", digest="third")]
    report(prefill[0], num_running=50, num_tokens=10_000)
    report(decode[0], num_running=50, num_blocks=90)
    policy = workers.policy("kv_aware", local_prefill_max_tokens=10_000)
    assert pick(policy, prefill, decode) == Pairing(None, decode[0])


@pytest.mark.parametrize("name", ALL[1:])
def test_policies_that_know_no_costs_name_no_candidates(name: str) -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    policy = workers.policy(name, local_prefill_max_tokens=10_000)
    pairing = pick(policy, prefill, decode)
    assert pairing.candidates == ()
    assert pairing.prefill is not None


@pytest.mark.parametrize("name", ALL)
def test_a_decision_is_told_to_the_other_gateways(name: str) -> None:
    workers, peers = Workers(), Peers()
    prefill, decode = workers.several("prefill", 1), workers.several("decode", 1)
    pick(workers.policy(name, peers=peers), prefill, decode)
    assert peers.told == [(prefill[0].epoch, 10 * SIZE, 10), (decode[0].epoch, 0, 10)]
    peers.told.clear()
    pick(workers.policy(name, peers=peers), [], workers.several("decode", 1))
    ((_, num_tokens, num_blocks),) = peers.told
    assert (num_tokens, num_blocks) == (10 * SIZE, 10)


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


def test_least_loaded_counts_the_sequences_of_other_gateways() -> None:
    workers, peers = Workers(), Peers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    peers.shares = {each.epoch: PeerShare(num_sequences=1) for each in (prefill[1], decode[0])}
    for seed in range(10):
        policy = workers.policy("least_loaded", seed, peers)
        assert pick(policy, prefill, decode) == Pairing(prefill[0], decode[1])
