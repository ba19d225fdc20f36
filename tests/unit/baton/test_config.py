"""Configuration: parsed once, frozen, and every fault named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from baton.config import BatonConfig, load_config, parse_config
from baton.errors import ConfigurationError
from baton.parallelism import Parallelism


def test_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"engine\.block_sise.*did you mean 'block_size'"):
        parse_config({"engine": {"block_sise": 8}})


def test_every_fault_gets_a_line() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_config({"gateway": {"port": 70000}, "engine": {"dtype": "float8"}})
    assert len(caught.value.message.splitlines()) == 2
    assert "gateway.port" in caught.value.message
    assert "engine.dtype" in caught.value.message


def test_no_decode_worker_is_refused_because_nothing_could_answer() -> None:
    with pytest.raises(ConfigurationError, match="decode"):
        parse_config({"pools": {"decode": {"replicas": 0}}})


def test_default_deadline_over_the_maximum_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_deadline_s"):
        parse_config({"gateway": {"default_deadline_s": 10, "max_deadline_s": 5}})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gateway": {"sse_keepalive_s": float("inf")}}, "sse_keepalive_s"),
        ({"gateway": {"host": ""}}, "host"),
        ({"model": ""}, "model"),
        ({"registry": {"heartbeat_s": 10}}, "heartbeat_s"),
        ({"cluster": {"fence_s": 1.5}}, "fence_s"),
        ({"registry": {"cluster": ".."}}, r"registry\.cluster"),
        ({"session": {"report_s": 30}}, "report_s"),
        ({"pools": {"decode": {"tensor_parallel_size": 0}}}, "tensor_parallel_size"),
        ({"pools": {"decode": {"engine": {"load_format": "dummy"}}}}, r"set engine\.load_format"),
        (
            {"pools": {"prefill": {}, "decode": {"engine": {"block_size": 32}}}},
            r"block_size .*16 in prefill, 32 in decode.* set engine\.block_size",
        ),
        (
            {"pools": {"prefill": {"engine": {"dtype": "float32"}}, "decode": {}}},
            r"dtype .*float32 in prefill, auto in decode.* set engine\.dtype",
        ),
        ({"pools": {"decode": {"engine": {"thraeds": 1}}}}, r"pools\.decode\.engine\.thraeds"),
        ({"pools": {"decode": {"worker": {"drain_s": -1}}}}, r"pools\.decode\.worker\.drain_s"),
        ({"pools": {"decode": {"replicas": 3, "max_replicas": 2}}}, "max_replicas"),
        ({"pools": {"decode": {}, "long": {}}}, r"pools\.long\.role"),
        ({"pools": {"decode": {}, "Long/1": {"role": "decode"}}}, "Long/1"),
        ({"pools": {"decode": {"replcas": 2}}}, "did you mean 'replicas'"),
    ],
)
def test_setting_that_could_never_work_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        parse_config(settings)


def test_pools_may_differ_in_what_no_hand_off_depends_on() -> None:
    own = {"kv_cache_bytes": 2**22, "threads": 1, "max_num_seqs": 3, "max_model_len": 64}
    pools = {
        "prefill": {"engine": {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 8}},
        "decode": {"engine": {"block_size": 32, **own}},
    }
    config = parse_config({"engine": {"dtype": "float32"}, "pools": pools})
    assert config.for_pool("decode").engine.max_model_len == 64
    assert {config.for_pool(name).engine.block_size for name in pools} == {32}


@pytest.mark.parametrize(
    "settings",
    [
        {"pools": {"decode": {"replicas": 3, "max_replicas": 2}}},
        {"pools": {"decode": {}, "Long/1": {"role": "decode"}}},
        {"pools": {"decode": {"engine": {"block_size": 0}}}},
        {"pools": {"decode": {"replicas": 0}}},
        {"gateway": {"default_deadline_s": 10, "max_deadline_s": 5}},
    ],
)
def test_fault_is_said_in_our_words_alone(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_config(settings)
    assert "value error" not in caught.value.message.lower()


def test_section_that_is_no_mapping_is_refused_though_the_command_line_sets_it_too(
    tmp_path: Path,
) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text("gateway: 3\n")
    with pytest.raises(ConfigurationError, match="gateway"):
        load_config(path, {"gateway": {"port": 1}})


def test_section_with_nothing_in_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text("gateway:\nengine: {threads: 2}\n")
    assert load_config(path).gateway == BatonConfig().gateway


def test_command_line_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(
        "engine: {block_size: 8, threads: 3}\npools: {prefill: {replicas: 2}, decode: {}}\n"
    )
    config = load_config(path, {"engine": {"threads": 1}, "pools": {"decode": {"replicas": 3}}})
    assert (config.engine.block_size, config.engine.threads) == (8, 1)
    assert {name: pool.replicas for name, pool in config.pools.items()} == {
        "prefill": 2,
        "decode": 3,
    }


def test_configuration_survives_the_file_that_hands_it_to_a_worker(tmp_path: Path) -> None:
    config = parse_config(
        {"engine": {"dtype": "float32"}, "pools": {"decode": {"engine": {"threads": 2}}}}
    )
    path = tmp_path / "worker.json"
    path.write_text(config.model_dump_json())
    assert load_config(path) == config


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1"])
def test_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"odd\.yaml"):
        load_config(path)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_configuration_cannot_be_changed() -> None:
    config = BatonConfig()
    with pytest.raises(ValidationError):
        config.engine.block_size = 4  # type: ignore[misc]


def test_pool_has_the_role_of_its_name_and_settings_of_its_own() -> None:
    config = parse_config(
        {
            "engine": {"threads": 3, "max_num_seqs": 7},
            "pools": {
                "prefill": {"engine": {"threads": 1}},
                "long": {"role": "decode", "replicas": 2, "worker": {"drain_s": 90}},
            },
        }
    )
    assert (config.num_replicas("prefill"), config.num_replicas("decode")) == (1, 2)
    prefill, long = config.for_pool("prefill"), config.for_pool("long")
    assert (prefill.engine.threads, prefill.engine.max_num_seqs) == (1, 7)
    assert (long.engine.threads, long.worker.drain_s) == (3, 90)
    assert list(long.pools) == ["long"]
    with pytest.raises(ConfigurationError, match="there is no pool 'short'"):
        config.for_pool("short")


def test_each_pool_has_degrees_of_its_own() -> None:
    wide = {"tensor_parallel_size": 2, "expert_parallel_size": 4}
    config = parse_config({"pools": {"decode": wide, "more": {"role": "decode"}}})
    assert config.for_pool("decode").own_parallelism == Parallelism(2, 4)
    assert config.for_pool("more").own_parallelism.num_ranks == 1


def test_pools_of_a_file_are_all_there_are(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text("pools: {decode: {}}\n")
    assert list(load_config(path).pools) == ["decode"]
    assert list(load_config(None).pools) == ["prefill", "decode"]


HANDED_OVER = {"device": "cuda", "experimental": ["gpu_handoff"]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"engine": {"device": "cuda"}}, r"handing over a GPU's KV is written and was never run"),
        (
            {"pools": {"prefill": {}, "decode": {"engine": {"device": "cuda"}}}},
            r"cuda in pool decode, .*engine\.experimental: \[gpu_handoff\]",
        ),
        (
            {
                "engine": HANDED_OVER,
                "pools": {"prefill": {}, "decode": {"tensor_parallel_size": 2}},
            },
            "pool decode has several ranks",
        ),
        (
            {"pools": {"prefill": {}, "decode": {"engine": HANDED_OVER}}},
            r"engine\.device differs between pools \(cpu in prefill, cuda in decode\)",
        ),
    ],
    ids=["not-asked-for", "of-one-pool", "several-ranks", "beside-a-cpu"],
)
def test_a_gpu_beside_a_prefill_pool_is_refused_where_kv_cannot_be_handed_over(
    data: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse_config(data)


def test_gpus_that_hand_over_are_asked_for_by_name() -> None:
    both = parse_config({"engine": HANDED_OVER})
    assert {both.for_pool(name).engine.device for name in both.pools} == {"cuda"}
    alone = {"engine": {"device": "cuda"}, "pools": {"prefill": {"replicas": 0}, "decode": {}}}
    assert parse_config(alone).for_pool("decode").engine.device == "cuda"


def test_any_device_means_the_cpu_beside_a_prefill_pool() -> None:
    engine = {"device": "auto"}
    assert parse_config({"engine": engine}).for_pool("decode").engine.device == "cpu"
    alone = parse_config({"engine": engine, "pools": {"decode": {}}})
    assert alone.for_pool("decode").engine.device == "auto"
