"""What ``cuda_ipc`` alone does, with a stand-in for CUDA's driver."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator

import pytest

from baton.config import KvTransferConfig
from baton.errors import ConfigurationError, TransferError
from kv_transfer.transports import cuda_ipc
from kv_transfer.transports.base import LinkError
from kv_transfer.transports.cuda_ipc import Gpu
from tests.support.cuda_standin import StandinDriver
from tests.support.cuda_standin import cuda_driver as cuda_driver
from tests.support.handoff import LAYOUT, Decode, Prefill, key_between, until

CONFIG = KvTransferConfig(transport="cuda_ipc", attach_s=5, lease_s=5, operation_s=3)


@pytest.fixture
async def pair(cuda_driver: StandinDriver) -> AsyncIterator[tuple[Prefill, Decode]]:
    prefill, decode = await Prefill.start(CONFIG), await Decode.start(CONFIG)
    yield prefill, decode
    await decode.close()
    await prefill.close()


async def hand_over(
    prefill: Prefill, decode: Decode, source_blocks: list[int], blocks: list[int], number: int = 1
) -> None:
    num_tokens = len(blocks) * LAYOUT.block_size
    key = key_between(prefill, decode, number)
    prefill.sender.offer(key, start_token=0, num_tokens=num_tokens)
    decode.begin(key, prefill, start_token=0, num_tokens=num_tokens, block_ids=blocks)
    prefill.compute(key, num_tokens, source_blocks)
    await until(lambda: (key in decode.ready or key in decode.drained) and prefill.freed)


async def test_blocks_that_follow_each_other_are_one_copy(
    pair: tuple[Prefill, Decode], cuda_driver: StandinDriver
) -> None:
    await hand_over(*pair, source_blocks=[4, 5, 6, 9], blocks=[1, 2, 3, 4])
    assert pair[1].ready
    assert cuda_driver.num_copies == 2


async def test_a_peers_memory_is_mapped_as_long_as_its_link_lasts(
    cuda_driver: StandinDriver,
) -> None:
    prefill, decode = await Prefill.start(CONFIG), await Decode.start(CONFIG)
    await hand_over(prefill, decode, [4], [1])
    assert len(cuda_driver.opened) == 1
    await decode.close()
    assert not cuda_driver.opened
    await prefill.close()


@pytest.mark.parametrize("function", ["cuMemcpyDtoDAsync", "cuStreamSynchronize"])
async def test_a_copy_that_fails_fails_its_transfer_and_ends_the_link(
    pair: tuple[Prefill, Decode], cuda_driver: StandinDriver, function: str
) -> None:
    prefill, decode = pair
    cuda_driver.fails.add(function)
    await hand_over(prefill, decode, [4], [1])
    (error,) = decode.failed.values()
    assert isinstance(error, TransferError)
    assert f"{function} failed: CUDA_ERROR_UNKNOWN" in error.message
    await until(lambda: not cuda_driver.opened)
    cuda_driver.fails.clear()
    await hand_over(prefill, decode, [4], [1], number=2)
    assert decode.ready


async def test_a_worker_whose_memory_cannot_be_exported_refuses_to_start(
    cuda_driver: StandinDriver,
) -> None:
    cuda_driver.fails.add("cuIpcGetMemHandle")
    with pytest.raises(ConfigurationError, match=r"requires cuda_ipc: cuIpcGetMemHandle failed"):
        await Prefill.start(CONFIG)


async def test_a_worker_without_a_driver_refuses_to_start(cuda_driver: StandinDriver) -> None:
    cuda_driver.fails.add("cuInit")
    with pytest.raises(ConfigurationError, match=r"requires cuda_ipc: cuInit failed"):
        await Decode.start(CONFIG)


async def test_under_auto_what_cannot_be_mapped_goes_another_way(
    cuda_driver: StandinDriver,
) -> None:
    """Pools on a GPU, of which one process cannot open the other's handle: as between two
    containers."""
    auto = KvTransferConfig(attach_s=5, lease_s=5, operation_s=3)
    prefill = await Prefill.start(auto, on_gpu=True)
    decode = await Decode.start(auto, on_gpu=True)
    cuda_driver.fails.add("cuIpcOpenMemHandle")
    await hand_over(prefill, decode, [4, 7], [1, 3])
    assert decode.ready
    assert (decode.pool.tokens[[1, 3]] == prefill.pool.before[[4, 7]]).all()
    await decode.close()
    await prefill.close()


async def test_a_pool_that_ends_beyond_its_allocation_is_not_mapped(
    pair: tuple[Prefill, Decode], cuda_driver: StandinDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Gpu, "num_bytes", lambda gpu, address: LAYOUT.num_bytes
    )  # no room before it
    await hand_over(*pair, [4], [1])
    (error,) = pair[1].failed.values()
    assert "the peer's allocation has" in str(error)
    assert not cuda_driver.opened


@pytest.mark.usefixtures("cuda_driver")
def test_a_handle_of_another_length_is_refused() -> None:
    with pytest.raises(LinkError, match="a handle has 64 bytes, the peer's 3"):
        Gpu(0).open(b"abc")


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(LinkError, match="pip install cuda-bindings"):
        importlib.reload(cuda_ipc).Gpu(0)
