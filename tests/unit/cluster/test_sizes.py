"""What sizes are allowed, which of wish and configuration counts, who comes and goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_pools import FakeProcess

from baton.config import BatonConfig, parse_config
from baton.errors import InvalidRequestError
from baton.records import PoolWish, PoolWishes
from cluster.sizes import (
    free_ids,
    gpu_conflict,
    pool_of,
    sizes_to_begin_with,
    who_leaves,
    wished_sizes,
    wishes_of,
)
from cluster.slots import SlotView


def config(prefill: int = 1, decode: int = 2, *, most: int = 8) -> BatonConfig:
    pools = {
        "prefill": {"replicas": prefill, "max_replicas": most},
        "decode": {"replicas": decode, "max_replicas": most},
    }
    return parse_config({"pools": pools})


def test_wish_counts_while_the_configuration_says_what_it_said_then() -> None:
    stored = wishes_of(config(1, 2), {"prefill": 3, "decode": 5})
    assert sizes_to_begin_with(config(1, 2), stored) == {"prefill": 3, "decode": 5}


def test_configuration_that_has_changed_since_counts_for_its_pool_alone() -> None:
    stored = wishes_of(config(1, 2), {"prefill": 3, "decode": 5})
    assert sizes_to_begin_with(config(1, 4), stored) == {"prefill": 3, "decode": 4}


def test_nothing_stored_means_as_configured() -> None:
    assert sizes_to_begin_with(config(1, 2), None) == {"prefill": 1, "decode": 2}


def test_wish_for_a_pool_that_is_gone_or_has_another_role_is_forgotten() -> None:
    wish = PoolWish(role="prefill", replicas=7, configured=2)
    stored = PoolWishes(pools={"decode": wish, "long": wish})
    assert sizes_to_begin_with(config(1, 2), stored) == {"prefill": 1, "decode": 2}


def test_wish_over_a_maximum_that_was_lowered_is_cut() -> None:
    stored = wishes_of(config(1, 2), {"prefill": 1, "decode": 5})
    assert sizes_to_begin_with(config(1, 2, most=3), stored)["decode"] == 3


def gpu_config(
    backend: str = "processes", *, device: str = "cuda", experimental: Sequence[str] = ()
) -> BatonConfig:
    return parse_config(
        {
            "engine": {"device": device, "experimental": list(experimental)},
            "cluster": {"backend": backend},
            "pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 1}},
        }
    )


def test_workers_of_plain_processes_that_would_share_a_gpu_are_refused() -> None:
    refused = gpu_conflict(gpu_config(), {"prefill": 0, "decode": 2})
    assert refused is not None
    assert "2 workers" in refused
    assert gpu_conflict(gpu_config(), {"prefill": 0, "decode": 1}) is None
    assert gpu_conflict(gpu_config("ray"), {"prefill": 0, "decode": 2}) is None
    assert gpu_conflict(gpu_config(device="auto"), {"prefill": 0, "decode": 2}) is not None
    assert gpu_conflict(gpu_config(device="cpu"), {"prefill": 0, "decode": 2}) is None
    shared = gpu_config(experimental=["gpu_handoff"])
    assert gpu_conflict(shared, {"prefill": 1, "decode": 1}) is None
    with pytest.raises(InvalidRequestError, match="same GPU"):
        wished_sizes(gpu_config(), {"prefill": 0, "decode": 1}, {"decode": 2})


def test_a_wish_from_before_is_forgotten_where_workers_would_share_a_gpu() -> None:
    stored = wishes_of(gpu_config("ray"), {"prefill": 0, "decode": 2})
    assert sizes_to_begin_with(gpu_config(), stored) == {"prefill": 0, "decode": 1}


def test_wishes_that_leave_no_decode_worker_any_more_are_forgotten() -> None:
    two = {"a": {"role": "decode", "replicas": 1}, "b": {"role": "decode", "replicas": 1}}
    stored = wishes_of(parse_config({"pools": two}), {"a": 0, "b": 1})
    two["b"]["replicas"] = 0
    assert sizes_to_begin_with(parse_config({"pools": two}), stored) == {"a": 1, "b": 0}


PRESENT = {"prefill": 1, "decode": 2}


def test_pools_that_are_not_named_stay_as_they_are() -> None:
    assert wished_sizes(config(), PRESENT, {"decode": 4}) == {"prefill": 1, "decode": 4}
    assert wished_sizes(config(), PRESENT, {}) == PRESENT
    assert wished_sizes(config(), PRESENT, {"prefill": 0})["prefill"] == 0


@pytest.mark.parametrize(
    ("wish", "param", "sentence"),
    [
        ({"decoed": 1}, "decoed", "there is no pool 'decoed'; there are: prefill, decode"),
        ({"decode": -1}, "decode", "cannot have -1"),
        ({"decode": 9}, "decode", "at most 8"),
        ({"prefill": 2, "decode": 0}, "decode", "no decode worker"),
        ({"decode": "3"}, "decode", "integer"),
        ({"decode": 3.0}, "decode", "integer"),
        ({"decode": True}, "decode", "integer"),
        ({"decode": None}, "decode", "integer"),
        ({"decode": {"replicas": 3}}, "decode", "integer"),
    ],
)
def test_wish_that_cannot_be_met_is_refused_by_name(
    wish: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=sentence) as caught:
        wished_sizes(config(), PRESENT, wish)
    assert caught.value.param == param


def test_other_decode_pool_may_take_over() -> None:
    two = {"a": {"role": "decode", "replicas": 1}, "b": {"role": "decode", "replicas": 1}}
    several = parse_config({"pools": two})
    assert wished_sizes(several, {"a": 1, "b": 1}, {"a": 0}) == {"a": 0, "b": 1}


@given(st.sets(st.integers(0, 20)), st.integers(0, 8))
def test_new_names_are_the_lowest_that_nobody_has(used: set[int], num: int) -> None:
    taken = {f"decode-{index}" for index in used} | {"prefill-0"}
    names = free_ids("decode", taken, num)
    assert len(set(names)) == num
    assert taken.isdisjoint(names)
    highest = max((int(name.partition("-")[2]) for name in names), default=-1)
    assert all(f"decode-{i}" in taken or f"decode-{i}" in names for i in range(highest))


@pytest.mark.parametrize(
    ("worker_id", "pool"),
    [
        ("decode-0", "decode"),
        ("decode-12", "decode"),
        ("long-ctx-3", "long-ctx"),
        ("long-3", None),
        ("decode", None),
        ("decode-x", None),
        ("decode-²", None),
        ("decode--1", None),
    ],
)
def test_pool_is_read_from_a_workers_name(worker_id: str, pool: str | None) -> None:
    assert pool_of(worker_id, ["decode", "long-ctx"]) == pool


async def test_those_that_serve_nobody_leave_first_then_the_outdated_then_the_highest() -> None:
    slots = [
        SlotView("decode", f"decode-{i}", None if i in (1, 3) else FakeProcess(""), 0, False, False)
        for i in (0, 1, 2, 3, 4, 5, 10)
    ]

    def leavers(num: int) -> list[str]:
        return who_leaves(
            slots,
            num,
            is_registered=lambda name: name != "decode-2",
            is_outdated=lambda name: name in ("decode-0", "decode-4"),
        )

    assert leavers(7) == [
        *("decode-3", "decode-1"),
        *("decode-2",),
        *("decode-4", "decode-0"),
        *("decode-10", "decode-5"),
    ]
    assert leavers(0) == []
