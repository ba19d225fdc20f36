"""The benchmarks' own way to start a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import write_tiny_llama

from baton.errors import UnavailableError
from benchmarks.server import BatonServer
from cluster.procfs import descendants


def test_it_is_ready_with_every_worker_and_leaves_nothing(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    arguments = ("--prefill", "0", "--decode", "2", "--model", str(model))
    settings = {"engine": {"kv_cache_bytes": 2 * 1024 * 1024}}
    with BatonServer(tmp_path / "run", settings=settings, arguments=arguments) as server:
        workers = server.status()["workers"]
        assert [(row["role"], row["ready"]) for row in workers] == [("decode", True)] * 2
        assert server.model() == "tiny"
        assert server.metric("baton_kv_blocks", role="decode", state="free") > 0
        processes = descendants(server.pid)
        assert processes
        assert server.stop() == 0
    assert not [p for p in processes if Path(f"/proc/{p.pid}/cmdline").exists()]


def test_what_cannot_be_served_is_said(tmp_path: Path) -> None:
    server = BatonServer(tmp_path, arguments=("--model", "/nowhere/model"))
    with pytest.raises(UnavailableError, match="/nowhere/model"):
        server.start()
