"""Where others are told to find a worker."""

from __future__ import annotations

import pytest

from baton.errors import ConfigurationError
from baton.worker.address import advertised_host, joined


def test_worker_is_found_where_it_listens_unless_told_otherwise() -> None:
    assert advertised_host("127.0.0.1", {}) == "127.0.0.1"
    assert advertised_host("0.0.0.0", {"BATON_ADVERTISE_HOST": "10.0.0.7"}) == "10.0.0.7"
    assert advertised_host("10.1.1.1", {"BATON_ADVERTISE_HOST": "  "}) == "10.1.1.1"


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", "[::]"])
def test_every_interface_is_no_address_for_others(wildcard: str) -> None:
    with pytest.raises(ConfigurationError, match=r"worker\.host is .* set BATON_ADVERTISE_HOST"):
        advertised_host(wildcard, {})
    with pytest.raises(ConfigurationError, match="BATON_ADVERTISE_HOST is"):
        advertised_host("127.0.0.1", {"BATON_ADVERTISE_HOST": wildcard})


def test_ipv6_address_is_bracketed_once() -> None:
    assert joined("fd00::7", 80) == joined("[fd00::7]", 80) == "[fd00::7]:80"
    assert joined("worker.example", 80) == "worker.example:80"
