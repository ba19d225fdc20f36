"""What UCX is told of the network that a worker may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kv_transfer.transports import ucx
from kv_transfer.transports.base import LinkError

LOCAL, ELSEWHERE = "127.0.0.1", "192.0.2.1"


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """Two cards: one with a port up and one down, the other with none up."""
    for card, port, state in [("mlx5_0", 1, "4: ACTIVE"), ("mlx5_0", 2, "1: DOWN"),
                              ("mlx5_1", 1, "2: INIT")]:  # fmt: skip
        folder = tmp_path / card / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
    return tmp_path


@pytest.fixture
def at_eth0(monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 is the address of eth0."""
    addresses = {"lo": LOCAL, "eth0": ELSEWHERE, "eth1": "192.0.2.2"}
    monkeypatch.setattr(ucx.socket, "if_nameindex", lambda: list(enumerate(addresses)))
    monkeypatch.setattr(ucx, "_addresses", lambda name: [ucx._address(addresses[name])])


def test_ports_that_are_up_are_named_as_ucx_names_them(cards: Path) -> None:
    assert ucx.rdma_ports(cards) == ["mlx5_0:1"]
    assert ucx.rdma_ports(cards / "none") == []


@pytest.mark.parametrize("host", [LOCAL, "127.0.0.2", "localhost", "::1", "[::1]"])
def test_loopback_address_allows_loopback_alone(cards: Path, host: str) -> None:
    found = ucx.environment(host, "any", {}, rdma_root=cards)
    assert found == {"UCX_NET_DEVICES": "lo"}


@pytest.mark.usefixtures("at_eth0")
def test_other_address_allows_its_interface_and_rdma(cards: Path) -> None:
    found = ucx.environment(ELSEWHERE, "any", {}, rdma_root=cards)
    assert found == {"UCX_NET_DEVICES": "mlx5_0:1,eth0"}
    found = ucx.environment(ELSEWHERE, "any", {}, rdma_root=cards / "none")
    assert found == {"UCX_NET_DEVICES": "eth0"}


def test_addresses_of_an_interface_are_found() -> None:
    assert ucx._address(LOCAL) in ucx._addresses("lo")
    assert ucx._addresses("no-such-interface") == []


@pytest.mark.usefixtures("at_eth0")
def test_address_that_is_not_this_machines_is_an_error(cards: Path) -> None:
    with pytest.raises(LinkError, match=r"192\.0\.2\.9; name UCX's interfaces in UCX_NET_DEVICES"):
        ucx.environment("192.0.2.9", "any", {}, rdma_root=cards)


def test_devices_that_the_user_names_are_left_alone(cards: Path) -> None:
    given = {"UCX_NET_DEVICES": "eth7"}
    assert ucx.environment("192.0.2.9", "any", given, rdma_root=cards) == {}


def test_required_rdma_leaves_ucx_no_tcp(cards: Path) -> None:
    found = ucx.environment(ELSEWHERE, "rdma", {}, rdma_root=cards)
    assert found == {"UCX_NET_DEVICES": "mlx5_0:1", "UCX_TLS": "^tcp"}
    given = {"UCX_TLS": "rc,sm,self", "UCX_NET_DEVICES": "eth0,mlx5_0"}
    assert ucx.environment(ELSEWHERE, "rdma", given, rdma_root=cards) == {}


def test_required_rdma_without_a_port_that_is_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="lists no port that is up"):
        ucx.environment(LOCAL, "rdma", {}, rdma_root=tmp_path)


@pytest.mark.parametrize("transports", ["all", "tcp", "rc,tcp,sm", "^ud", "^sm,self"])
def test_required_rdma_refuses_transports_with_tcp(cards: Path, transports: str) -> None:
    with pytest.raises(LinkError, match="allows TCP"):
        ucx.environment(LOCAL, "rdma", {"UCX_TLS": transports}, rdma_root=cards)


@pytest.mark.parametrize("devices", ["eth0", "lo", "mlx5_1:1", "mlx5_0:2"])
def test_required_rdma_refuses_devices_without_a_port(cards: Path, devices: str) -> None:
    with pytest.raises(LinkError, match="names none of mlx5_0:1"):
        ucx.environment(LOCAL, "rdma", {"UCX_NET_DEVICES": devices}, rdma_root=cards)


def test_variables_are_gone_afterwards() -> None:
    before = dict(os.environ)
    with ucx.applied({"UCX_BATON_TEST": "1"}):
        assert os.environ["UCX_BATON_TEST"] == "1"
    assert dict(os.environ) == before
