"""Which workers a choice goes to."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, cast

from router.routing.policy import LeastLoaded
from router.workers.session import WorkerSession


@dataclass(frozen=True)
class Record:
    digest: str


class Worker:
    def __init__(self, num_sequences: int, digest: str = "one") -> None:
        self.num_sequences = num_sequences
        self.record = Record(digest)


def pick(prefill: list[Worker], decode: list[Worker], seed: int = 0) -> Any:
    return LeastLoaded(random.Random(seed)).pick(
        cast(list[WorkerSession], prefill), cast(list[WorkerSession], decode)
    )


def test_pair_with_the_fewest_sequences_is_chosen() -> None:
    prefill = [Worker(3), Worker(1), Worker(2)]
    decode = [Worker(9), Worker(4)]
    pairing = pick(prefill, decode)
    assert pairing is not None
    assert pairing.prefill is prefill[1]
    assert pairing.decode is decode[1]


def test_equal_workers_are_drawn_among() -> None:
    decode = [Worker(1), Worker(1), Worker(2)]
    drawn = set()
    for seed in range(40):
        pairing = pick([], decode, seed)
        assert pairing is not None
        drawn.add(decode.index(pairing.decode))
    assert drawn == {0, 1}


def test_no_decode_worker_is_no_pairing() -> None:
    assert pick([Worker(0)], []) is None


def test_no_prefill_worker_leaves_decode_alone() -> None:
    pairing = pick([], [Worker(0)])
    assert pairing is not None
    assert pairing.prefill is None


def test_only_equal_digests_pair_even_where_load_says_otherwise() -> None:
    prefill = [Worker(0, "old"), Worker(50, "new")]
    decode = [Worker(5, "new")]
    pairing = pick(prefill, decode)
    assert pairing is not None
    assert pairing.prefill is prefill[1]


def test_decode_worker_with_a_partner_goes_before_an_idle_one_without() -> None:
    decode = [Worker(0, "new"), Worker(5, "old")]
    pairing = pick([Worker(2, "old")], decode)
    assert pairing is not None
    assert pairing.decode is decode[1]
