"""Names, paths and networks that a pod could not come up with are refused when it is rendered."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from support.chart import GIVEN, refusal, render

Json = dict[str, Any]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _hub(repo: str, revision: str = COMMIT) -> Json:
    return {"model": {"source": "huggingFace", "huggingFace": {"repo": repo, "revision": revision}}}


def _block(cidr: str, **more: Any) -> Json:
    return {"networkPolicy": {"clients": [{"ipBlock": {"cidr": cidr, **more}}]}}


REPOS = [
    *("gpt2", "org/model", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d-e", "_a/b_"),
    *("a" * 96, f"{'a' * 96}/{'b' * 96}", "https://huggingface.co/org/model", "org/a model"),
    *("org/../model", "../model", "org/model/x", "org/", "/model", "org/-m", "org/m.", "a--b"),
    *("org/model.git", "a" * 97, f"{'a' * 97}/b", "org/модель", "org/model\n", "org/model@main"),
]


@pytest.mark.parametrize("repo", REPOS)
def test_models_are_named_as_the_hub_names_them(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        assert "which names no model of the hub: OWNER/NAME" in refusal(_hub(repo))
    else:
        assert render(GIVEN, _hub(repo)).documents


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:7], f"{COMMIT}0", "g" * 40])
def test_a_revision_is_a_whole_commit(revision: str) -> None:
    said = refusal(_hub("org/model", revision))
    assert f'model.huggingFace.revision is "{revision}", which is no commit' in said


def _hidden(name: str, path: str) -> tuple[Json, str]:
    return {"paths": {name: path}}, f"paths.{name} is .*: the volume mounted there would hide"


MISFITS: dict[str, tuple[Json, str]] = {
    "a model outside of its volume": (
        {"model": {"source": "pvc", "path": "a/../../b", "pvc": {"claimName": "c"}}},
        r'model.path is "a/../../b": .* without \.\. in it',
    ),
    "a folder of the node's that is relative": (
        {"model": {"source": "hostPath", "hostPath": {"path": "srv/models"}}},
        'model.hostPath.path is "srv/models": the kubelet mounts an absolute path',
    ),
    "a folder of the node's that goes up": (
        {"model": {"source": "hostPath", "hostPath": {"path": "/srv/../models"}}},
        r"model.hostPath.path is .* without \.\. in it",
    ),
    "a claim that is none": (
        {"model": {"source": "pvc", "pvc": {"claimName": "my_models"}}},
        'model.pvc.claimName is "my_models", which can name no PersistentVolumeClaim',
    ),
    "the model over all of the image": _hidden("model", "/"),
    "the model over Baton": _hidden("model", "/opt"),
    "the model inside of Baton": _hidden("model", "/opt/baton/models"),
    "the model over the home": _hidden("model", "/home/"),
    "the configuration over the system's": _hidden("config", "/etc"),
    "the configuration over the system's, spelled otherwise": _hidden("config", "//etc/./"),
    "the cache over Python": _hidden("cache", "/usr/local"),
    "the cache among libraries": _hidden("cache", "/usr/lib/baton"),
    "sockets among the kernel's files": _hidden("run", "/proc/baton"),
    "sockets among devices": _hidden("run", "/dev/shm"),
    "a mount that goes up": (
        {"paths": {"cache": "/var/../cache"}},
        r'paths.cache is "/var/../cache": no volume is mounted at a path with \.\. in it',
    ),
    "a Secret that is none": (
        {"secrets": {"apiKey": {"value": "", "existingSecret": "My_Secret"}}},
        'secrets.apiKey.existingSecret is "My_Secret", which can name no Secret: lower-case',
    ),
    "a Secret of Ray's that is none": (
        {"secrets": {"rayToken": {"value": "", "existingSecret": "ray-"}}},
        "secrets.rayToken.existingSecret is",
    ),
    "a Secret of Redis' that is none": (
        {"redis": {"url": "", "existingSecret": "a..b"}},
        "redis.existingSecret is",
    ),
    "a Secret of Ray's Redis that is none": (
        {"rayRedis": {"password": {"existingSecret": "a/b"}}},
        "rayRedis.password.existingSecret is",
    ),
    "a Secret that is too long": (
        {"secrets": {"huggingFace": {"existingSecret": "a" * 254}}},
        "secrets.huggingFace.existingSecret is",
    ),
    "a Secret for images that is none": (
        {"images": {"pullSecrets": ["good", "Bad"]}},
        r'images.pullSecrets\[1\] is "Bad"',
    ),
    "an account that is none": (
        {"serviceAccount": {"create": False, "names": {"worker": "a b"}}},
        'serviceAccount.names.worker is "a b", which can name no ServiceAccount',
    ),
    "a network without its prefix's length": (
        _block("10.0.0.0"),
        'networkPolicy.clients has an ipBlock of "10.0.0.0", which is no network',
    ),
    "a network whose prefix is too long": (_block("10.0.0.0/33"), "which is no network"),
    "a network of no addresses": (_block("10.0.0.256/32"), "which is no network"),
    "a long network whose prefix is too long": (_block("fd00::/129"), "which is no network"),
    "a network of Redis' that is none": (
        {"networkPolicy": {"redis": {"to": [{"ipBlock": {"cidr": "redis.data"}}]}}},
        'networkPolicy.redis.to has an ipBlock of "redis.data"',
    ),
    "an exception that is no network": (
        _block("10.0.0.0/8", **{"except": ["10.1.0.0"]}),
        'an ipBlock of "10.1.0.0", which is no network',
    ),
    "a network and a selector": (
        {
            "networkPolicy": {
                "monitoring": [
                    {"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {"matchLabels": {"a": "b"}}}
                ]
            }
        },
        "networkPolicy.monitoring has a peer with an ipBlock and a selector",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_refused_in_a_sentence(name: str) -> None:
    values, sentence = MISFITS[name]
    assert re.search(sentence, refusal(values))


@pytest.mark.parametrize(
    "over",
    [
        {"model": {"source": "hostPath", "hostPath": {"path": "/srv/a..b"}, "path": "a..b/c"}},
        {"paths": {"model": "/opt/models", "cache": "/var/cache", "config": "/etc/other"}},
        {"paths": {"model": "/srv/models", "run": "/run", "cache": "/home/baton/.cache"}},
        {"secrets": {"apiKey": {"value": "", "existingSecret": "a.b-c.9"}}},
        _block("10.0.0.0/8", **{"except": ["10.1.2.3/32"]}),
        _block("0.0.0.0/0"),
        _block("2001:db8::/32"),
        _block("::/0"),
        _block("::ffff:10.0.0.0/104"),
    ],
)
def test_what_is_well_is_taken(over: Json) -> None:
    assert render(GIVEN, over).documents
