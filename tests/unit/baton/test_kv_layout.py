"""The layout's arithmetic against numpy's own idea of the same array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv_layout import KvLayout

LAYOUT = KvLayout(7, 3, 30, 16, 64, "bfloat16")
FACTS = {"weights_revision": "r", "generation": "0", "protocol_version": 1}


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 5),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    num_kv_parts=st.integers(1, 2),
)
def test_strides_and_sizes_are_those_of_a_contiguous_array(
    sizes: tuple[int, int, int, int, int], dtype: str, num_kv_parts: int
) -> None:
    layout = KvLayout(*sizes, dtype, num_kv_parts)  # type: ignore[arg-type]
    array = np.zeros(layout.shape, dtype=np.uint16 if dtype == "bfloat16" else np.float32)
    assert array.strides == layout.strides
    assert array.nbytes == layout.num_bytes
    assert array[0].nbytes == layout.block_bytes == layout.token_bytes * layout.block_size
    assert layout.scratch_block == array.shape[0] - 1


def test_token_bytes_are_layers_times_two_times_heads_times_dim_times_size() -> None:
    assert LAYOUT.token_bytes == 30 * 2 * 3 * 64 * 2


def test_a_token_of_one_part_is_kept_once_and_not_per_head() -> None:
    """DeepSeek-V3: 61 layers of a latent vector of 512 and a rotated key of 64."""
    layout = KvLayout(7, 1, 61, 16, 512 + 64, "bfloat16", num_kv_parts=1)
    assert layout.token_bytes == 61 * (512 + 64) * 2


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens_round_up(tokens: int, blocks: int) -> None:
    assert LAYOUT.num_blocks_for(tokens) == blocks


def test_digest_ignores_the_pools_size_and_nothing_else() -> None:
    digest = LAYOUT.digest(**FACTS)  # type: ignore[arg-type]
    assert replace(LAYOUT, num_blocks=9).digest(**FACTS) == digest  # type: ignore[arg-type]
    others = [
        replace(LAYOUT, num_kv_heads=1),
        replace(LAYOUT, num_layers=1),
        replace(LAYOUT, block_size=8),
        replace(LAYOUT, head_dim=32),
        replace(LAYOUT, dtype="float32"),
        replace(LAYOUT, num_kv_parts=1),
    ]
    digests = {other.digest(**FACTS) for other in others}  # type: ignore[arg-type]
    for name, value in [("weights_revision", "s"), ("generation", "1"), ("protocol_version", 2)]:
        digests.add(LAYOUT.digest(**(FACTS | {name: value})))  # type: ignore[arg-type]
    assert len(digests) == 9
    assert digest not in digests
