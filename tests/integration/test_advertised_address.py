"""Workers that listen on every interface and are found at another address than that."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.server import BatonServer
from support.sockets import listening_addresses
from support.tiny_models import write_tiny_llama

from cluster.procfs import descendants

pytestmark = pytest.mark.slow

ELSEWHERE, AS_THE_KERNEL_SAYS = "127.0.0.2", "0200007F"


def test_sessions_and_handoffs_over_tcp_use_the_advertised_address(tmp_path: Path) -> None:
    settings = {
        "model": str(write_tiny_llama(tmp_path / "model")),
        "engine": {"dtype": "float32", "kv_cache_bytes": 4 << 20},
        "worker": {"host": "0.0.0.0"},
        "kv_transfer": {"transport": "gloo"},
    }
    environment = {"BATON_ADVERTISE_HOST": ELSEWHERE}
    server = BatonServer(tmp_path, settings=settings, environment=environment).start()
    try:
        addresses = [row["address"] for row in server.status()["workers"]]
        assert len(addresses) == 2
        assert all(address.startswith(f"{ELSEWHERE}:") for address in addresses)
        answer = server.complete(prompt="the thin inn in the " * 8, max_tokens=4)
        assert answer["choices"][0]["finish_reason"] == "length"
        server.wait_at_rest()
        heard = [listening_addresses(process) for process in descendants(server.pid)]
        assert len([each for each in heard if AS_THE_KERNEL_SAYS in each]) == 2, "gloo's own"
        assert server.metric("baton_kv_handoff_bytes_total", transport="gloo") > 0
    finally:
        server.stop()
