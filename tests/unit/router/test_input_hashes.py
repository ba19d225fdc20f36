"""An input's blocks are named as its workers name them."""

from __future__ import annotations

import asyncio

from router.routing.input_hashes import BLOCKS_AT_ONCE, InputHashes
from tests.support.routing import NAMES, SIZE, Workers


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
