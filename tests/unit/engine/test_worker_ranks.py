"""A worker process and the ranks that it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.tiny_architectures import VARIANTS, save_variant

from baton.config import BatonConfig, parse_config
from baton.errors import CheckpointError
from cluster.procfs import descendants
from engine import worker_parts
from engine.setup import plan_engine
from engine.worker_parts import WorkerParts, log_ranks
from kv_transfer.memory import KvMemory


@pytest.fixture
def config(tmp_path: Path) -> BatonConfig:
    """Of a decode worker of two ranks with a thread each."""
    save_variant(tmp_path / "m", VARIANTS["llama"])
    return parse_config(
        {
            "model": str(tmp_path / "m"),
            "engine": {"kv_cache_bytes": 1 << 20, "dtype": "float32", "threads": 1},
            "pools": {"decode": {"tensor_parallel_size": 2}},
        }
    ).for_pool("decode")


async def test_ranks_end_with_a_worker_whose_engine_cannot_be_made(
    config: BatonConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []

    def refuse(*_: Any, **__: Any) -> None:
        there.append(len(descendants(os.getpid())))
        raise CheckpointError("damaged")

    monkeypatch.setattr(worker_parts, "Engine", refuse)
    plan = plan_engine(config, secret="s", parallel=config.own_parallelism)
    memory = KvMemory(plan.layout.num_bytes, sealed=False)
    before = len(descendants(os.getpid()))
    with pytest.raises(CheckpointError, match="damaged"):
        await WorkerParts.build(
            config,
            plan,
            memory.buffer,
            memory_fd=memory.fd,
            worker_id="decode-0",
            role="decode",
        )
    assert there == [before + 1]
    assert len(descendants(os.getpid())) == before
    memory.close()


@pytest.mark.parametrize(("num_cores", "is_crowded"), [(2, False), (1, True)])
def test_ranks_that_share_cores_are_warned_of(
    config: BatonConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_cores: int,
    is_crowded: bool,
) -> None:
    plan = plan_engine(config, secret="s", parallel=config.own_parallelism)
    monkeypatch.setattr(worker_parts.os, "sched_getaffinity", lambda _: set(range(num_cores)))
    with caplog.at_level("INFO"):
        log_ranks("decode-0", plan.rank_task(config, "torch"))
    assert "decode-0: 2 ranks of 1 threads each" in caplog.text
    assert ("share 1 cores" in caplog.text) == is_crowded
