"""A Redis that pods would not reach, or that serves two, is refused when the chart is rendered."""

from __future__ import annotations

import re
from typing import Any

import helm_python as helm
import pytest
from support.chart import GIVEN, refusal, render

Json = dict[str, Any]

REDIS_AWAY: Json = {"redis": {"url": ""}}
RAY_REDIS_AWAY: Json = {"rayRedis": {"address": ""}}

MISFITS: dict[str, tuple[Json, str]] = {
    "a Redis on a port that the policy closes": (
        {"redis": {"url": "redis://:p@redis.example:6380/0"}},
        "redis.url is on port 6380, but networkPolicy.redis.port is 6379; set it to 6380",
    ),
    "a Redis of Ray's on a port that the policy closes": (
        {"rayRedis": {"address": "redis://ray-redis.example:6390"}},
        "rayRedis.address is on port 6390",
    ),
    "a Redis past the last port": (
        {"redis": {"url": "redis://:p@r:70000/0"}, "networkPolicy": {"enabled": False}},
        "redis.url is on port 70000, which is none",
    ),
    "one Redis for both": (
        {
            "redis": {"url": "redis://:p@redis.example:6379/0"},
            "rayRedis": {"address": "redis://redis.example:6379"},
        },
        "are one Redis",
    ),
    "one Redis for both, by two names": (
        {
            "redis": {"url": "redis://:p@Redis.llm.svc.cluster.local/0"},
            "rayRedis": {"address": "redis://redis:6379"},
        },
        "are one Redis",
    ),
    "Baton's embedded Redis for Ray": (
        {
            "redis": {"url": "", "embedded": {"enabled": True, "password": {"value": "p"}}},
            "rayRedis": {"address": "redis://chat-baton-redis.llm.svc:6379"},
        },
        "are one Redis",
    ),
    "Ray's embedded Redis for Baton": (
        {
            "redis": {"url": "redis://:q@chat-baton-ray-redis:6379/0"},
            "rayRedis": {
                "address": "",
                "password": {"value": "q"},
                "embedded": {"enabled": True},
            },
        },
        "are one Redis",
    ),
    "one key of one Secret for both": (
        {
            "redis": {"url": "", "existingSecret": "s", "key": "k"},
            "rayRedis": {"password": {"existingSecret": "s", "key": "k"}},
        },
        "are both the key k of the Secret s",
    ),
    "a Redis in every pod": (
        {"redis": {"url": "redis://:p@localhost:6379/0"}},
        "redis.url is on localhost:6379, which is another place in every pod",
    ),
    "a Redis of Ray's in every pod": (
        {"rayRedis": {"address": "redis://127.0.0.1:6379"}},
        "rayRedis.address is on 127.0.0.1:6379",
    ),
    "another protocol": ({"redis": {"url": "http://redis"}}, "redis.url is no URL of a Redis"),
    "a socket that pods do not share": (
        {"redis": {"url": "unix:///run/redis.sock"}},
        "redis.url is no URL of a Redis",
    ),
    "a Redis without a host": ({"redis": {"url": "redis:///0"}}, "redis.url is no URL"),
    "another protocol of Ray's": (
        {"rayRedis": {"address": "http://redis"}},
        "rayRedis.address is no address that Ray reads",
    ),
    "a password of two words for Ray": (
        {"rayRedis": {"password": {"value": "two words"}}},
        "rayRedis.password.value becomes a word",
    ),
    "a password in quotes for Ray": (
        {"rayRedis": {"password": {"value": "'quoted'"}}},
        "rayRedis.password.value becomes a word",
    ),
    "a password for everybody to read": (
        {"rayRedis": {"address": "redis://:p@ray-redis.example:6379"}},
        "holds a password",
    ),
    "no Redis": (REDIS_AWAY, "Baton needs a Redis"),
    "two Redis": ({"redis": {"embedded": {"enabled": True}}}, "are both set; choose one"),
    "two words on the Redis": ({"redis": {"existingSecret": "s"}}, "are both set; choose one"),
    "password that is no part of a URL": (
        {"redis": {"url": "", "embedded": {"enabled": True, "password": {"value": "a/b"}}}},
        "becomes part of a URL",
    ),
    "no Redis of Ray's": (RAY_REDIS_AWAY, "Ray's GCS needs a Redis of its own"),
    "two Redis of Ray's": ({"rayRedis": {"embedded": {"enabled": True}}}, "choose one"),
    "a Redis for nothing": (
        {
            "ray": {"gcsFaultTolerance": {"enabled": False}},
            "rayRedis": {"address": "", "embedded": {"enabled": True}},
        },
        "of no use without",
    ),
    "a Redis in the place of the API key": (
        {"redis": {"key": "api-key"}},
        'redis.key is "api-key", which another secret has already',
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_refused_in_a_sentence(name: str) -> None:
    values, sentence = MISFITS[name]
    assert re.search(sentence, refusal(values))


@pytest.mark.parametrize("password", ["pa%zz", "pa#ss", "p@ss/w", "p ss"])
def test_a_password_that_is_not_escaped_is_not_shown(password: str) -> None:
    url = f"redis://:{password}@redis.data:6379/0"
    with pytest.raises(helm.HelmRenderError, match="as in %2F for /") as refused:
        render(GIVEN, {"redis": {"url": url}})
    assert password not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p%23ss~!@redis.data:6379/0",
        "rediss://user:p@redis.data:6379/1?ssl_cert_reqs=none",
        "redis://[fd00::1]:6379",
        "redis://10.0.0.7",
    ],
)
def test_urls_of_a_redis_are_taken(url: str) -> None:
    assert render(GIVEN, {"redis": {"url": url}})
