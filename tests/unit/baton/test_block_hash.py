"""The chain of block hashes: equal prefixes agree, everything else differs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.block_hash import HASH_BYTES, HashDomain

DOMAIN = HashDomain(key=b"k" * 32, weights_revision="r1", kv_dtype="bfloat16")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=80)


@given(tokens=TOKENS, more=TOKENS, block_size=st.integers(1, 17))
def test_longer_input_keeps_the_hashes_of_its_prefix(
    tokens: list[int], more: list[int], block_size: int
) -> None:
    root = DOMAIN.root()
    short = DOMAIN.chain(root, tokens, block_size)
    assert len(short) == len(tokens) // block_size
    assert all(len(value) == HASH_BYTES for value in short)
    assert DOMAIN.chain(root, tokens + more, block_size)[: len(short)] == short


@given(tokens=st.lists(st.integers(0, 999), min_size=8, max_size=40), data=st.data())
def test_changed_token_changes_its_block_and_all_after_it(
    tokens: list[int], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(tokens) // 4 * 4 - 1))
    changed = list(tokens)
    changed[index] += 1
    before = DOMAIN.chain(DOMAIN.root(), tokens, 4)
    after = DOMAIN.chain(DOMAIN.root(), changed, 4)
    assert before[: index // 4] == after[: index // 4]
    assert not set(before[index // 4 :]) & set(after[index // 4 :])


def test_what_must_not_be_shared_has_another_root() -> None:
    roots = {
        DOMAIN.root(),
        DOMAIN.root(cache_salt="tenant"),
        DOMAIN.root(adapter="tenant"),
        DOMAIN.root(adapter="ten", cache_salt="ant"),
        HashDomain(b"k" * 32, "r2", "bfloat16").root(),
        HashDomain(b"k" * 32, "r1", "float32").root(),
        HashDomain(b"x" * 32, "r1", "bfloat16").root(),
    }
    assert len(roots) == 7


def test_key_is_needed_to_predict_a_hash() -> None:
    other = HashDomain(b"x" * 32, "r1", "bfloat16")
    parent = bytes(HASH_BYTES)
    assert DOMAIN.extend(parent, [1, 2]) != other.extend(parent, [1, 2])
