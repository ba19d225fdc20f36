"""Images that no container runtime finds, or of another version, are refused at rendering."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.chart import GIVEN, refusal, render

Json = dict[str, Any]


def _pool(**settings: Any) -> Json:
    return {"pools": {"decode": settings}}


MISFITS: dict[str, tuple[Json, str]] = {
    "a tag in the repository": (
        {"images": {"gateway": {"repository": "reg/foo:1"}}},
        r'images.gateway.repository is "reg/foo:1", .* \(that is images.gateway.tag\)',
    ),
    "a digest in the repository": (
        {"images": {"controller": {"repository": "reg/foo@sha256:" + "0" * 64}}},
        "images.controller.repository is .* which names no image",
    ),
    "a repository in upper case": (
        {"images": {"worker": {"repository": "REG/Foo"}}},
        'images.worker.repository is "REG/Foo", which names no image',
    ),
    "a pool's repository that names no image": (
        _pool(image={"repository": "https://reg/foo"}),
        "pools.decode.image.repository is .* which names no image",
    ),
    "a suffix that is no part of a tag": (
        {"images": {"worker": {"suffix": "-a/b"}}},
        'images.worker: "0.1.0-a/b" is no tag of an image',
    ),
    "gateway of another version": (
        {"images": {"gateway": {"tag": "0.2.0"}}},
        'images.gateway.tag is "0.2.0", but this chart is made for "0.1.0"',
    ),
    "workers of another version": ({"images": {"worker": {"tag": "latest"}}}, "of one version"),
    "one pool of another version": (
        _pool(image={"tag": "0.0.9-cuda"}),
        'pools.decode.image.tag is "0.0.9-cuda"',
    ),
    "controller of another version": (
        {"images": {"controller": {"repository": "c", "tag": "9"}}},
        "images.controller.tag",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_refused_in_a_sentence(name: str) -> None:
    values, sentence = MISFITS[name]
    assert re.search(sentence, refusal(values))


@pytest.mark.parametrize(
    "repository",
    ["a", "reg.example/a/b_c--d.e__f", "localhost:5000/a", "REG/a"],
)
def test_a_repository_of_any_registry_is_taken(repository: str) -> None:
    rendered = render(GIVEN, {"images": {"worker": {"repository": repository}}})
    assert rendered.worker()["image"] == f"{repository}:0.1.0-cuda"


def test_other_tags_are_taken_from_who_knows_better() -> None:
    over = {
        "images": {"allowVersionSkew": True, "worker": {"tag": "mine"}},
        **_pool(image={"repository": "special", "tag": "yours"}),
    }
    rendered = render(GIVEN, over)
    assert rendered.worker("prefill")["image"] == "baton-worker:mine"
    assert rendered.worker("decode")["image"] == "special:yours"


def test_the_right_tag_may_be_said_and_pinned() -> None:
    digest = "sha256:" + "0" * 64
    over = {"images": {"gateway": {"tag": "0.1.0", "digest": digest}}}
    spec = render(GIVEN, over).one("Deployment", "gateway")["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == f"baton-gateway:0.1.0@{digest}"
