"""Every quantity of the values is rendered as Kubernetes writes it: as a string."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.chart import GIVEN, Rendered, render

Json = dict[str, Any]


def _quantities(node: Any) -> Iterator[Any]:
    """Below ``requests``, ``limits`` and ``sizeLimit``, wherever these are."""
    if isinstance(node, list):
        for each in node:
            yield from _quantities(each)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("requests", "limits"):
                yield from value.values()
            elif key == "sizeLimit":
                yield value
            else:
                yield from _quantities(value)


def _everywhere(quantity: Any) -> Rendered:
    """That many CPUs, and as many bytes of what is a size, for everybody."""
    part: Json = {"resources": {"requests": {"cpu": quantity}}}
    redis: Json = {
        **part,
        "enabled": True,
        "persistence": {"enabled": True, "size": quantity},
    }
    over: Json = {
        "gateway": part,
        "controller": part,
        "ray": {"head": {**part, "shmSize": quantity}, "autoscaling": {"enabled": True, **part}},
        "poolDefaults": {**part, "shmSize": quantity},
        "redis": {"url": "", "embedded": {**redis, "password": {"value": "p"}}},
        "rayRedis": {"address": "", "password": {"value": "q"}, "embedded": redis},
        "model": {
            "source": "huggingFace",
            "huggingFace": {"repo": "a/b", "revision": "c" * 40, "sizeLimit": quantity},
        },
    }
    return render(GIVEN, over)


@pytest.mark.parametrize(
    ("given", "rendered"),
    [(0.5, "0.5"), (1.5, "1.5"), (3, "3"), (0, "0"), (1e6, "1000000"), ("501m", "501m")],
)
def test_a_number_becomes_the_text_of_it(given: Any, rendered: str) -> None:
    documents = _everywhere(given).documents
    found = list(_quantities(documents))
    assert all(isinstance(each, str) for each in found)
    # CPUs of gateways, controller, head, autoscaler, two pools and two Redis; /dev/shm of three,
    # the model's volume of three, and the disks of the two.
    assert found.count(rendered) == 8 + 3 + 3 + 2


def test_large_sizes_are_whole_numbers() -> None:
    size = 2**42
    over = {"shmSize": 2**40, "resources": {"limits": {"memory": size}}}
    rendered = render(GIVEN, {"pools": {"decode": over}})
    assert rendered.worker()["resources"] == {"limits": {"memory": str(size)}}
    (shm,) = (
        each
        for each in rendered.group("decode")["template"]["spec"]["volumes"]
        if each["name"] == "shm"
    )
    assert shm["emptyDir"]["sizeLimit"] == str(2**40)


@pytest.mark.parametrize(("given", "number"), [(2, 2), ("2", 2), ("2.0", 2), ("1k", 1000)])
def test_devices_are_counted_however_they_are_written(given: Any, number: int) -> None:
    resources = {"limits": {"nvidia.com/gpu": given}}
    rendered = render(GIVEN, {"pools": {"decode": {"resources": resources}}})
    assert rendered.group("decode")["rayStartParams"]["num-gpus"] == str(number)


def test_claims_of_devices_stay_as_they_are() -> None:
    claims = [{"name": "gpu", "request": "one"}]
    rendered = render(GIVEN, {"pools": {"decode": {"resources": {"claims": claims}}}})
    assert rendered.worker()["resources"] == {"claims": claims}
