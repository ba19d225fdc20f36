"""An address of Ray's Redis is taken where Ray's head would start with it, and nowhere else."""

from __future__ import annotations

import helm_python as helm
import pytest
from support.chart import GIVEN, render


def _is_read_by_ray(address: str) -> bool:
    """By what Ray's head does with it before it starts the GCS."""
    from ray._private.services import get_address  # not before a test runs: see tests/conftest.py

    try:
        return int(get_address(address)[1]) >= 0
    except (TypeError, ValueError):
        return False


@pytest.mark.parametrize(
    "address",
    [
        "redis://ray-redis.data.svc:6379",
        "rediss://ray-redis.data.svc:6379",
        "redis://10.0.0.7:6379",
        "redis://[fd00::1]:6379",
    ],
)
def test_an_address_with_its_port_is_taken(address: str) -> None:
    assert _is_read_by_ray(address)
    options = render(GIVEN, {"rayRedis": {"address": address}}).ray["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == address


@pytest.mark.parametrize(
    "address",
    [
        "redis://ray-redis.data.svc",
        "redis://ray-redis.data.svc:6379/",
        "redis://ray-redis.data.svc:6379/0",
        "redis://ray-redis.data.svc:6379?db=1",
        "redis://[fd00::1]",
        "unix:///run/redis.sock",
    ],
)
def test_what_ray_cannot_read_is_refused(address: str) -> None:
    assert not _is_read_by_ray(address)
    with pytest.raises(helm.HelmRenderError, match="no address that Ray reads: redis://HOST:PORT"):
        render(GIVEN, {"rayRedis": {"address": address}})


def test_a_list_of_addresses_is_refused() -> None:
    """Ray and KubeRay take the first one alone."""
    with pytest.raises(helm.HelmRenderError, match="one of them, with its port"):
        render(GIVEN, {"rayRedis": {"address": "redis://a:6379,b:6379"}})
