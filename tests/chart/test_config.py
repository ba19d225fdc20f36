"""The ConfigMap is a configuration that Baton reads, and says what was meant."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml
from support.chart import COMPLETE, GIVEN, Rendered, refusal, render

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL, BatonConfig, load_config
from baton.parallelism import Parallelism, valid_num_ranks
from cluster.ray_backend import bundle_of

Json = dict[str, Any]


def _load(rendered: Rendered, folder: Path) -> BatonConfig:
    path = folder / "baton.yaml"
    path.write_text(rendered.baton_yaml)
    return load_config(path)


@pytest.mark.parametrize("name", ["given", "values-cpu.yaml"])
def test_baton_reads_the_configuration(name: str, tmp_path: Path) -> None:
    rendered = render(COMPLETE[name])
    config = _load(rendered, tmp_path)
    assert config.model == "smollm2-135m-instruct"
    assert config.gateway.host == config.controller.host == config.worker.host == "0.0.0.0"
    assert (config.gateway.port, config.controller.port) == (8000, 8081)
    assert (config.worker.port, config.worker.metrics_port) == (7100, 7101)
    assert config.registry.cluster == "chat"
    assert config.cluster.backend == "ray"
    assert config.cluster.ray_address == "ray://chat-baton-head-svc:10001"
    assert set(config.pools) == {"prefill", "decode"}
    for pool, settings in config.pools.items():
        assert settings.role == pool
        assert settings.resources == {f"baton-pool-{pool}": 1.0}
    generation = rendered.group("decode")["template"]["metadata"]["annotations"]
    assert generation["baton.dev/generation"] == config.generation


def test_the_h100_values_require_rdma(tmp_path: Path) -> None:
    config = _load(render(COMPLETE["values-h100-rdma.yaml"]), tmp_path)
    assert (config.kv_transfer.transport, config.kv_transfer.network) == ("nixl", "rdma")
    assert config.pools["decode"].parallelism == Parallelism(4)


def test_pools_become_pools(tmp_path: Path) -> None:
    values: Json = {
        "pools": {
            "prefill": None,
            "decode": {
                "replicas": 3,
                "maxReplicas": 5,
                "numCpus": 2,
                "drainSeconds": 7.5,
                "resources": {"limits": {"nvidia.com/gpu": 2}},
                "engine": {"max_num_seqs": 7},
                "worker": {"port": 7200},
            },
            "Long_Prompts": {"role": "prefill", "replicas": 2},
        }
    }
    config = _load(render(GIVEN, values), tmp_path)
    assert set(config.pools) == {"decode", "long-prompts"}
    decode = config.pools["decode"]
    assert (decode.replicas, decode.max_replicas) == (3, 5)
    assert (decode.num_cpus, decode.num_gpus) == (2.0, 2.0)
    workers = config.for_pool("decode")
    assert workers.engine.max_num_seqs == 7
    assert (workers.worker.port, workers.worker.metrics_port) == (7200, 7101)
    assert workers.worker.drain_s == 7.5
    assert config.pools["long-prompts"].role == "prefill"


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"tensorParallelSize": 3, "numCpus": 2}, {"CPU": 6}),
        (
            {"tensorParallelSize": 3, "resources": {"limits": {"nvidia.com/gpu": 6}}},
            {"CPU": 3, "GPU": 6},
        ),
    ],
    ids=["on CPUs", "on GPUs"],
)
def test_pods_offer_ray_what_a_worker_of_several_ranks_asks_for(
    settings: Json, asked: dict[str, float], tmp_path: Path
) -> None:
    rendered = render(GIVEN, {"pools": {"decode": settings}})
    offered = rendered.group("decode")["rayStartParams"]
    bundle = bundle_of(_load(rendered, tmp_path).pools["decode"])
    assert bundle == {**asked, "baton-pool-decode": 1}
    assert offered["num-cpus"] == str(asked["CPU"])
    assert offered["num-gpus"] == str(asked.get("GPU", 0))


def test_degrees_are_refused_that_the_embedded_model_cannot_be_split_by() -> None:
    valid = valid_num_ranks(open_checkpoint(DEFAULT_MODEL).config)
    taken = []
    for degree in range(1, 13):
        with contextlib.suppress(helm.HelmRenderError):
            render(GIVEN, {"pools": {"decode": {"tensorParallelSize": degree}}})
            taken.append(degree)
    assert taken == valid


@pytest.mark.parametrize("in_pool", [False, True])
def test_more_tokens_than_the_embedded_model_was_trained_for_are_refused(in_pool: bool) -> None:
    def values(length: int) -> Json:
        part = {"engine": {"max_model_len": length}}
        return {"pools": {"decode": part}} if in_pool else {"config": part}

    limit = open_checkpoint(DEFAULT_MODEL).config.max_position
    assert render(GIVEN, values(limit)).documents
    said = refusal(values(limit + 1))
    assert f"engine.max_model_len is {limit + 1}, but the embedded model was trained" in said
    other = {"model": {"source": "pvc", "pvc": {"claimName": "c"}}}
    assert render(GIVEN, values(limit + 1), other).documents


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"source": "embedded"}, "smollm2-135m-instruct"),
        ({"source": "pvc", "pvc": {"claimName": "c"}}, "/models"),
        ({"source": "pvc", "path": "a/b", "pvc": {"claimName": "c"}}, "/models/a/b"),
        ({"source": "hostPath", "path": "m.gguf", "hostPath": {"path": "/srv"}}, "/models/m.gguf"),
        ({"source": "image", "path": "/m", "image": {"reference": "r/m:1"}}, "/models/m"),
        (
            {"source": "huggingFace", "huggingFace": {"repo": "o/m", "revision": "a" * 40}},
            "/models",
        ),
    ],
)
def test_each_source_of_the_model_is_where_baton_looks(model: Json, expected: str) -> None:
    rendered = render(GIVEN, {"model": model})
    assert yaml.safe_load(rendered.baton_yaml)["model"] == expected
    for name, spec in rendered.pod_specs():
        if "gateway" in name or name in ("prefill", "decode"):
            mounts = {m["name"]: m for m in spec["containers"][0]["volumeMounts"]}
            volumes = {each["name"] for each in spec["volumes"]}
            assert set(mounts) == volumes
            assert ("model" in mounts) == (model["source"] != "embedded")
            if "model" in mounts:
                assert mounts["model"]["readOnly"] is True


def test_configuration_of_the_user_wins(tmp_path: Path) -> None:
    values = {
        "config": {
            "gateway": {"host": "::", "port": 9000},
            "cluster": {"ray_address": "ray://127.0.0.1:9001"},
            "registry": {"cluster": "other", "ttl_s": 9},
            "routing": {"policy": "random"},
            "generation": "7",
        },
        "networkPolicy": {"enabled": False},  # they let the controller reach one head alone
    }
    config = _load(render(GIVEN, values), tmp_path)
    assert (config.gateway.host, config.gateway.port) == ("::", 9000)
    assert config.cluster.ray_address == "ray://127.0.0.1:9001"
    assert (config.registry.cluster, config.registry.ttl_s) == ("other", 9)
    assert config.routing.policy == "random"
    assert config.generation == "7"


def test_large_numbers_stay_whole() -> None:
    values = {"config": {"engine": {"kv_cache_bytes": 8589934592}}}
    assert "kv_cache_bytes: 8589934592" in render(GIVEN, values).baton_yaml


@pytest.mark.parametrize("name", ["=", "~", "on", "1e3", "12:30:45", "a: b", "# b", "<<", "a\n="])
def test_a_models_name_is_read_as_it_was_given(name: str, tmp_path: Path) -> None:
    """Go writes YAML, and PyYAML, which knows other words, reads it."""
    values = {"config": {"served_model_name": name}}
    assert _load(render(GIVEN, values), tmp_path).served_model_name == name


def _generation(*over: Json) -> str:
    return str(yaml.safe_load(render(GIVEN, *over).baton_yaml)["generation"])


@pytest.mark.parametrize(
    "values",
    [
        {"config": {"engine": {"dtype": "float32"}}},
        {"config": {"kv_transfer": {"transport": "gloo"}}},
        {"model": {"embedded": {"name": "/models/other.gguf"}}},
        {"images": {"worker": {"repository": "elsewhere/baton-worker"}}},
    ],
)
def test_what_workers_must_agree_on_makes_a_new_generation(values: Json) -> None:
    assert _generation(values) != _generation()


@pytest.mark.parametrize(
    "values",
    [
        {"pools": {"decode": {"replicas": 2}}},
        {"pools": {"decode": {"maxReplicas": 9}}},
        {"pools": {"more": {"role": "prefill"}}},
        {"config": {"gateway": {"max_queued": 1}}},
        {"config": {"routing": {"policy": "random"}}},
        {"config": {"cluster": {"fence_s": 9}}},
    ],
)
def test_what_workers_need_not_agree_on_keeps_the_generation(values: Json) -> None:
    assert _generation(values) == _generation()


def _checksums(*over: Json) -> dict[str, str]:
    rendered = render(GIVEN, *over)
    found = {
        name: rendered.one("Deployment", name)["spec"]["template"]["metadata"]["annotations"]
        for name in ("gateway", "controller")
    }
    found |= {
        name: rendered.group(name)["template"]["metadata"]["annotations"]
        for name in ("prefill", "decode")
    }
    return {name: annotations["checksum/config"] for name, annotations in found.items()}


@pytest.mark.parametrize(
    ("values", "rolled"),
    [
        ({"pools": {"decode": {"replicas": 2}}}, {"controller"}),
        ({"pools": {"decode": {"maxReplicas": 9}}}, {"controller"}),
        ({"config": {"controller": {"port": 8082}}}, {"controller"}),
        ({"config": {"gateway": {"max_queued": 1}}}, {"gateway", "controller"}),
        ({"pools": {"decode": {"drainSeconds": 9}}}, {"gateway", "controller", "decode"}),
        (
            {"config": {"engine": {"max_num_seqs": 9}}},
            {"gateway", "controller", "prefill", "decode"},
        ),
        ({"config": {"generation": "7"}}, {"gateway", "controller", "prefill", "decode"}),
    ],
)
def test_a_change_rolls_those_whom_it_concerns(values: Json, rolled: set[str]) -> None:
    before, after = _checksums(), _checksums(values)
    assert {name for name in before if before[name] != after[name]} == rolled
