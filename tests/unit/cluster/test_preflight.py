"""Faults that are found before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.tiny_models import write_tiny_llama

from baton.config import parse_config
from baton.errors import CheckpointError, ConfigurationError
from cluster import preflight
from router.main import _open_model


def test_port_in_use_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigurationError, match=rf"port {port} on 127.0.0.1 is in use.*--port"
        ):
            preflight.check_port("127.0.0.1", port)
    preflight.check_port("127.0.0.1", port)


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1.*--host"):
        preflight.check_port("192.0.2.1", 8000)


def test_every_gateways_port_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[tuple[str, int]] = []
    monkeypatch.setattr(preflight, "check_port", lambda *place: looked_at.append(place))
    config = parse_config({"gateway": {"port": 8000, "replicas": 3}})
    assert preflight.gateway_ports(config) == (8000, 8001, 8002)
    assert looked_at == [("127.0.0.1", 8000), ("127.0.0.1", 8001), ("127.0.0.1", 8002)]


def test_gateways_get_the_configured_port_and_those_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[int] = []
    monkeypatch.setattr(preflight, "check_port", lambda _, port: looked_at.append(port))
    config = parse_config({"gateway": {"port": 9000, "replicas": 3}})
    assert preflight.gateway_ports(config) == (9000, 9001, 9002)
    assert looked_at == [9000, 9001, 9002]
    with pytest.raises(ConfigurationError, match="would need port 65536"):
        preflight.gateway_ports(parse_config({"gateway": {"port": 65534, "replicas": 3}}))


def test_port_0_is_a_free_one_for_each_gateway() -> None:
    ports = preflight.gateway_ports(parse_config({"gateway": {"port": 0, "replicas": 8}}))
    assert len(set(ports)) == 8
    assert 0 not in ports


def test_controllers_port_in_use_is_a_sentence() -> None:
    free = parse_config({}).controller
    with preflight.listen_for_controller(free) as first:
        taken = parse_config({"controller": {"port": first.getsockname()[1]}}).controller
        with pytest.raises(ConfigurationError, match=r"the controller cannot.*controller\.port"):
            preflight.listen_for_controller(taken)


def test_pool_whose_workers_would_be_named_like_gateways_is_refused() -> None:
    preflight.check_pools(parse_config({}))
    pools = {"gateway": {"role": "decode"}}
    with pytest.raises(ConfigurationError, match="choose another name"):
        preflight.check_pools(parse_config({"pools": pools}))


def test_workers_that_would_take_each_others_gpu_are_refused() -> None:
    pools = {"prefill": {"replicas": 0}, "decode": {"replicas": 2}}
    settings = {"engine": {"device": "cuda"}, "pools": pools}
    preflight.check_gpus(parse_config({**settings, "cluster": {"backend": "ray"}}))
    with pytest.raises(ConfigurationError, match="--backend ray with num_gpus"):
        preflight.check_gpus(parse_config({**settings, "cluster": {"backend": "processes"}}))


def test_missing_ray_names_both_ways_out() -> None:
    config = parse_config({})
    with pytest.raises(ConfigurationError, match="--backend processes"):
        preflight.check_backend(config, lambda _: None)
    preflight.check_backend(config, lambda _: object())
    preflight.check_backend(parse_config({"cluster": {"backend": "processes"}}), lambda _: None)


def test_ray_address_without_ray_is_refused() -> None:
    config = parse_config({"cluster": {"backend": "processes", "ray_address": "h:1"}})
    with pytest.raises(ConfigurationError, match="--ray-address"):
        preflight.check_backend(config, lambda _: object())


def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_platform()
    monkeypatch.setattr(preflight.sys, "platform", "darwin")
    with pytest.raises(ConfigurationError, match="Linux"):
        preflight.check_platform()


def test_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        preflight.local_model(parse_config({"model": str(tmp_path / "none")}))


def test_dummy_weights_need_no_file(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    settings = {"model": str(folder)}
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        preflight.local_model(parse_config(settings))
    dummy = parse_config({**settings, "engine": {"load_format": "dummy"}})
    assert preflight.local_model(dummy) == str(folder)
    checkpoint, tokenizer = _open_model(dummy)
    assert checkpoint.load_format == "dummy"
    assert tokenizer.get_vocab_size() == checkpoint.config.vocab_size


def test_model_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    assert preflight.local_model(parse_config({"model": "./llama"})) == str(tmp_path / "llama")
    assert preflight.local_model(parse_config({})) == "smollm2-135m-instruct"


def test_pool_that_the_model_cannot_be_split_over_is_refused() -> None:
    pools = {"decode": {"tensor_parallel_size": 2}, "more": {"role": "decode"}}
    with pytest.raises(ConfigurationError, match=r"pools\.decode: tensor_.* valid: 1, 3, 9"):
        preflight.local_model(parse_config({"pools": pools}))
    pools["decode"]["tensor_parallel_size"] = 3
    preflight.local_model(parse_config({"pools": pools}))


def test_every_rank_counts_when_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "sched_getaffinity", lambda _: set(range(24)))
    pools = {"decode": {"replicas": 2, "tensor_parallel_size": 3, "expert_parallel_size": 2}}
    assert preflight.default_threads(parse_config({"pools": pools})) == 2


@pytest.mark.parametrize(
    ("prefill", "decode", "threads"), [(1, 1, 4), (0, 1, 9), (2, 2, 2), (20, 20, 1)]
)
def test_workers_share_the_cores_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, prefill: int, decode: int, threads: int
) -> None:
    monkeypatch.setattr(preflight.os, "sched_getaffinity", lambda _: set(range(9)))
    pools = {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}}
    assert preflight.default_threads(parse_config({"pools": pools})) == threads
