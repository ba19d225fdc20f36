"""What the values' schema refuses, before any template is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import helm_python as helm
import pytest
import yaml
from support.chart import CHART, GIVEN, merged, render

Json = dict[str, Any]


def _pool(**settings: Any) -> Json:
    return {"pools": {"decode": settings}}


NOT_IN_THE_SCHEMA: dict[str, Json] = {
    "unknown key": {"gatway": {}},
    "unknown key of a section": {"gateway": {"replica": 2}},
    "unknown key of a pool": _pool(tensorParallel=2),
    "unknown key of RDMA": _pool(rdma={"enabled": True, "resource": "x"}),
    "unknown role": {"pools": {"x": {"role": "both"}}},
    "negative replicas": _pool(replicas=-1),
    "half a replica": _pool(replicas=1.5),
    "replicas as text": _pool(replicas="2"),
    "no parallelism at all": _pool(tensorParallelSize=0),
    "a number for ray start": _pool(rayStartParams={"num-cpus": 1}),
    "a quantity that is none": _pool(shmSize="lots"),
    "UCX over TCP": _pool(rdma={"enabled": True, "resourceName": "r", "ucxTls": "rc,tcp"}),
    "UCX over anything": _pool(rdma={"enabled": True, "resourceName": "r", "ucxTls": "all"}),
    "port": {"gateway": {"service": {"port": 70000}}},
    "source": {"model": {"source": "s3"}},
    "relative path": {"paths": {"config": "etc"}},
    "path that cannot be mounted": {"paths": {"config": "/a:b"}},
    "a key that no Secret may have": {"secrets": {"apiKey": {"key": "a b"}}},
    "a key that no Redis' Secret may have": {"redis": {"key": "a/b"}},
    "upgrade strategy": {"ray": {"upgradeStrategy": "RollingUpdate"}},
    "Ray's version": {"ray": {"version": "latest"}},
    "small object store": {"ray": {"objectStoreBytes": 1000}},
    "environment": {"gateway": {"env": {"A": "b"}}},
    "generation as a number": {"config": {"generation": 7}},
    "a peer that is none": {"networkPolicy": {"clients": [{"foo": 1}]}},
    "a peer that is everybody": {"networkPolicy": {"clients": [{}]}},
    "pull policy": {"images": {"pullPolicy": "Sometimes"}},
    "digest": {"images": {"worker": {"digest": "abc"}}},
    "unknown section of the configuration": {"config": {"engin": {}}},
    "unknown setting of the configuration": {"config": {"engine": {"max_num_seq": 8}}},
    "unknown setting of a pool's engine": _pool(engine={"max_num_seq": 8}),
    "unknown setting of a pool's worker": _pool(worker={"prot": 7100}),
    "unknown setting of all engines": {"poolDefaults": {"engine": {"max_num_seq": 8}}},
    "a setting out of its bounds": {"config": {"engine": {"block_size": 0}}},
    "no containers at all": _pool(extraPodSpec={"containers": None}),
    "containers that are no list": {"gateway": {"extraPodSpec": {"containers": {}}}},
    "a container without a name": {"controller": {"extraPodSpec": {"initContainers": [{}]}}},
    "a container without an image": _pool(extraPodSpec={"containers": [{"name": "side"}]}),
    "a container of no image": {
        "gateway": {"extraPodSpec": {"initContainers": [{"name": "side", "image": ""}]}}
    },
    "path that no command line takes": {"paths": {"config": "/etc/a, b"}},
    "volumes that are no list": {"ray": {"head": {"extraPodSpec": {"volumes": {"a": {}}}}}},
    "a label of everything that is too long": {"commonLabels": {"team": "a" * 64}},
    "a label's name that is none": {"gateway": {"labels": {"-team": "a"}}},
    "a label of a pool that is too long": _pool(labels={"team": "a" * 64}),
    "nodes with a label that is none": _pool(nodeSelector={"disk": "an ssd"}),
    "a seccomp profile of no type": {"podSecurityContext": {"seccompProfile": {"type": None}}},
    "a setting of another type": {"config": {"kv_transfer": {"verify": "yes"}}},
}


@pytest.mark.parametrize("name", NOT_IN_THE_SCHEMA)
def test_the_schema_refuses(name: str) -> None:
    with pytest.raises(helm.HelmError, match="values don't meet the specifications"):
        render(GIVEN, NOT_IN_THE_SCHEMA[name])


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"config": {"engine": {"max_num_seq": 8}}}, "/config/engine"),
        (_pool(engine={"max_num_seq": 8}), "/pools/decode/engine"),
    ],
)
def test_an_unknown_setting_of_batons_is_named(values: Json, place: str) -> None:
    with pytest.raises(helm.HelmError) as refused:
        render(GIVEN, values)
    assert place in str(refused.value)
    assert "max_num_seq" in str(refused.value)


def _sections(values: Json, *path: str) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield (*path, key)
            yield from _sections(value, *path, key)


SECTIONS = list(_sections(yaml.safe_load((CHART / "values.yaml").read_text())))


@pytest.mark.parametrize("path", SECTIONS, ids=".".join)
def test_a_section_that_is_emptied_is_taken_or_refused_by_name(path: tuple[str, ...]) -> None:
    over: Any = None
    for key in reversed(path):
        over = {key: over}
    said = ""
    try:
        render(merged(GIVEN, {}), over)
    except helm.HelmError as error:
        said = str(error)
    # The schema's words, or a sentence of the templates', but no fault inside of them.
    named = f"missing property '{path[-1]}'|got null|execution error"
    assert not said or re.search(named, said), said
