"""What workers must agree on before one may pull from the other."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
from pydantic import ValidationError

from baton.config import KvTransferConfig
from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from baton.protocol import PROTOCOL_VERSION
from kv_transfer import handshake
from kv_transfer.handshake import Identity, choose_transport, make_hello, make_welcome
from kv_transfer.hosts import host_id
from kv_transfer.transports import nixl_links
from kv_transfer.v1 import transfer_pb2 as pb

LAYOUT = KvLayout(
    num_blocks=8, num_kv_heads=2, num_layers=3, block_size=4, head_dim=8, dtype="bfloat16"
)
HERE = Identity("w0", b"e0", b"digest", "g1", LAYOUT, "host-a")
BOTH = ("shared_memory", "gloo")


def hello(transports: tuple[str, ...] = BOTH, host: str = "host-a") -> pb.PeerHello:
    return make_hello(Identity("w1", b"e1", b"digest", "g1", LAYOUT, host), transports)


def test_equal_workers_agree() -> None:
    assert handshake.refuse_hello(hello(), HERE) is None
    welcome = make_welcome(HERE, verify=False)
    assert handshake.refuse_welcome(welcome, HERE, worker_id="w0", verify=False) is None


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("protocol_version", 7, f"version differs: {PROTOCOL_VERSION} here, 7 at the peer"),
        ("generation", "g2", "rollout generation differs: g1 here, g2 at the peer"),
        ("digest", b"other", "compatibility digest"),
    ],
)
def test_hello_that_differs_is_refused_by_name(field: str, value: object, named: str) -> None:
    message = hello()
    setattr(message, field, value)
    reason = handshake.refuse_hello(message, HERE)
    assert reason is not None
    assert named in reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_kv_heads", 9),
        ("num_layers", 9),
        ("num_kv_parts", 1),
        ("block_size", 9),
        ("head_dim", 9),
        ("dtype", "float32"),
    ],
)
def test_layout_that_differs_is_refused_by_name(field: str, value: object) -> None:
    welcome = make_welcome(HERE, verify=False)
    setattr(welcome.layout, field, value)
    reason = handshake.refuse_welcome(welcome, HERE, worker_id="w0", verify=False)
    assert reason is not None
    assert f"KV layout ({field})" in reason


def test_strides_are_declared_not_assumed() -> None:
    welcome = make_welcome(HERE, verify=False)
    welcome.layout.strides[1] += 2
    reason = handshake.refuse_welcome(welcome, HERE, worker_id="w0", verify=False)
    assert reason is not None
    assert "strides" in reason


def test_pools_may_differ_in_size() -> None:
    welcome = make_welcome(HERE, verify=False)
    welcome.layout.num_blocks = 99
    assert handshake.refuse_welcome(welcome, HERE, worker_id="w0", verify=False) is None
    assert handshake.layout_of(welcome, HERE).num_blocks == 99


def test_another_worker_on_the_address_is_refused() -> None:
    welcome = make_welcome(HERE, verify=False)
    reason = handshake.refuse_welcome(welcome, HERE, worker_id="w5", verify=False)
    assert reason == "w0 answers where w5 was expected"


@pytest.mark.parametrize(
    ("offered", "host", "allowed", "chosen"),
    [
        (BOTH, "host-a", BOTH, "shared_memory"),
        (BOTH, "host-b", BOTH, "gloo"),
        (BOTH, "host-a", ("gloo",), "gloo"),
        (("gloo",), "host-a", BOTH, "gloo"),
        (("shared_memory",), "host-b", BOTH, None),
        (("gloo",), "host-a", ("shared_memory",), None),
        (("cuda_ipc", "gloo"), "host-a", ("cuda_ipc", "gloo"), "cuda_ipc"),
        (("cuda_ipc", "gloo"), "host-b", ("cuda_ipc", "gloo"), "gloo"),
        ((), "host-a", BOTH, None),
    ],
)
def test_best_transport_that_works_for_both_is_chosen(
    offered: tuple[str, ...], host: str, allowed: tuple[str, ...], chosen: str | None
) -> None:
    name, reason = choose_transport(hello(offered, host), HERE, allowed)
    assert name == chosen
    assert (reason == "") == (chosen is not None)


def test_forced_transport_is_the_only_one_allowed() -> None:
    forced = KvTransferConfig(transport="gloo")
    assert handshake.allowed_transports(forced, on_gpu=False) == ("gloo",)
    assert handshake.required_transports(KvTransferConfig(transport="gloo")) == ("gloo",)


def test_auto_allows_what_is_installed_and_no_tcp_where_rdma_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auto, rdma = KvTransferConfig(), KvTransferConfig(network="rdma")
    monkeypatch.setattr(nixl_links, "installed", lambda: False)
    assert handshake.allowed_transports(auto, on_gpu=False) == ("shared_memory", "gloo")
    monkeypatch.setattr(nixl_links, "installed", lambda: True)
    assert handshake.allowed_transports(auto, on_gpu=False) == ("shared_memory", "nixl", "gloo")
    assert handshake.allowed_transports(rdma, on_gpu=False) == ("shared_memory", "nixl")
    assert handshake.allowed_transports(auto, on_gpu=True) == ("cuda_ipc", "nixl", "gloo")
    assert handshake.required_transports(auto) == ()
    assert handshake.required_transports(rdma) == ("nixl",)


@pytest.mark.parametrize(
    ("transport", "why"),
    [
        ("gloo", "gloo is TCP"),
        ("shared_memory", "shared_memory uses no network"),
        ("cuda_ipc", "cuda_ipc uses no network"),
    ],
)
def test_rdma_over_what_is_none_is_refused(transport: str, why: str) -> None:
    with pytest.raises(ValidationError, match=f"transport {why}; set transport to nixl"):
        KvTransferConfig.model_validate({"transport": transport, "network": "rdma"})


def test_a_transport_that_is_not_built_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"nccl is not built: .*use cuda_ipc"):
        KvTransferConfig.model_validate({"transport": "nccl"})


@pytest.mark.parametrize(
    ("transport", "on_gpu", "lies"),
    [("shared_memory", True, "on a GPU"), ("cuda_ipc", False, "in the host's memory")],
)
def test_a_transport_that_cannot_reach_a_workers_kv_is_refused(
    transport: Literal["shared_memory", "cuda_ipc"], on_gpu: bool, lies: str
) -> None:
    config = KvTransferConfig(transport=transport)
    with pytest.raises(
        ConfigurationError, match=f"is {transport}, but this worker's KV lies {lies}"
    ):
        handshake.check_transport(config, on_gpu=on_gpu)
    handshake.check_transport(config, on_gpu=not on_gpu)
    handshake.check_transport(KvTransferConfig(), on_gpu=on_gpu)


def test_host_id_is_the_same_in_every_process_of_a_host() -> None:
    code = "from kv_transfer.hosts import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_id()


def test_handoff_over_shared_memory_needs_no_torch_and_nothing_else_of_baton() -> None:
    code = (
        "import sys, kv_transfer.client, kv_transfer.service\n"
        "bad = {'torch', 'ray', 'engine', 'router', 'prefill_workers', 'decode_workers'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
