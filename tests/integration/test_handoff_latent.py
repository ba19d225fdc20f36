"""The hand-off of latent KV: one engine prefills, another goes on from the bytes that arrived."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
import torch
from support.tiny_architectures import VARIANTS, oracle_logits, save_variant
from support.tiny_engine import DOMAIN, generate, kv_layout, prompt, run_step, tokens

from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.config import KvTransferConfig
from baton.errors import IncompatiblePeerError
from baton.kv_layout import KvLayout
from engine.engine import Engine
from tests.support.handoff import Decode, PoolMemory, Prefill, key_between, sample, until

SIZE = 8
NUM_HELD, NUM_TOKENS = 2 * SIZE, 45


class Ends(Protocol):
    async def __call__(
        self,
        config: KvTransferConfig,
        *,
        prefill: KvLayout,
        decode: KvLayout,
        digest: bytes | None = None,
    ) -> tuple[Prefill, Decode]: ...


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    """Makes both ends of a hand-off, of these layouts; closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            config: KvTransferConfig,
            *,
            prefill: KvLayout,
            decode: KvLayout,
            digest: bytes | None = None,
        ) -> tuple[Prefill, Decode]:
            sender = await Prefill.start(config, layout=prefill, digest=digest)
            stack.push_async_callback(sender.close)
            receiver = await Decode.start(config, layout=decode, digest=digest)
            stack.push_async_callback(receiver.close)
            return sender, receiver

        yield make


@pytest.fixture(params=["deepseek v2", "deepseek v3, rope yarn"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def engine_over(checkpoint: Checkpoint, layout: KvLayout, pool: PoolMemory) -> Engine:
    return Engine(
        checkpoint,
        dtype=torch.float32,
        layout=layout,
        memory=pool.memory.buffer,
        domain=DOMAIN,
    )


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
async def test_decode_goes_on_from_what_prefill_computed(
    tmp_path: Path, ends: Ends, variant: str, transport: str
) -> None:
    """Decode holds two blocks of the prompt already; the last block is filled in part."""
    model = save_variant(tmp_path, VARIANTS[variant])
    checkpoint = open_checkpoint(str(tmp_path))
    layout = kv_layout(checkpoint.config, 20, SIZE)
    assert layout.token_bytes == 3 * (24 + 8) * 4
    config = KvTransferConfig(transport=transport, attach_s=5, lease_s=5, operation_s=3)
    prefill, decode = await ends(config, prefill=layout, decode=layout)
    here = engine_over(checkpoint, layout, prefill.pool)
    there = engine_over(checkpoint, layout, decode.pool)
    question = tokens(NUM_TOKENS)

    held = prompt(question[: NUM_HELD + 1])
    run_step(there, held)
    there.kv.free(held)
    taken = prompt(question)
    assert there.kv.hold_prefix(taken) == NUM_HELD
    assert there.kv.ensure_blocks(taken, NUM_TOKENS)

    key = key_between(prefill, decode)
    prefill.sender.offer(key, start_token=NUM_HELD, num_tokens=NUM_TOKENS)
    decode.begin(
        key,
        prefill,
        start_token=NUM_HELD,
        num_tokens=NUM_TOKENS,
        block_ids=taken.block_table[NUM_HELD // SIZE :],
    )
    seq = prompt(question)
    while seq.num_emitted_tokens == 0:
        run_step(here, seq, chunk=13)
        prefill.sender.ready(key, seq.num_computed_tokens, seq.block_table)
    prefill.sender.commit(key, seq.token_ids[-1], 0, None)
    await until(lambda: (decode.ready or decode.failed) and prefill.freed)
    assert not decode.failed
    name = "baton_kv_handoff_bytes_total"
    num_bytes = (NUM_TOKENS - NUM_HELD) * layout.token_bytes
    assert sample(decode.registry, name, direction="received") == num_bytes

    there.kv.adopt(taken, NUM_TOKENS)
    taken.token_ids.append(seq.token_ids[-1])
    answer = generate(there, taken, 10)
    best = oracle_logits(model, taken.token_ids)[NUM_TOKENS - 1 : -1].argmax(dim=-1)
    assert answer == best.tolist()
    again = prompt(question)
    assert there.kv.hold_prefix(again) == NUM_TOKENS // SIZE * SIZE  # what arrived is cached


@pytest.mark.parametrize(
    ("digest", "said"),
    [(None, "compatibility digest"), (b"d" * 16, "KV layout (num_kv_parts)")],
)
async def test_pools_of_one_part_and_of_two_are_never_paired(
    ends: Ends, digest: bytes | None, said: str
) -> None:
    """Though a block of each has as many bytes; not even if their digests were the same."""
    latent = KvLayout(8, 1, 2, SIZE, 32, "float32", num_kv_parts=1)
    grouped = replace(latent, head_dim=16, num_kv_parts=2)
    assert latent.block_bytes == grouped.block_bytes
    config = KvTransferConfig(transport="shared_memory", attach_s=5, lease_s=5, operation_s=3)
    prefill, decode = await ends(config, prefill=latent, decode=grouped, digest=digest)
    key = key_between(prefill, decode)
    decode.begin(key, prefill, start_token=0, num_tokens=4, block_ids=[1])
    await until(lambda: decode.drained)
    assert isinstance(decode.failed[key], IncompatiblePeerError)
    assert said in decode.failed[key].message
