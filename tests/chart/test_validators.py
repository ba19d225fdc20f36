"""What Baton's own validators refuse, the chart refuses: pods would crash of it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import helm_python as helm
import pytest
from pydantic import BaseModel
from support.chart import GIVEN, render

import baton.config
from baton.config import parse_config
from baton.errors import ConfigurationError
from cluster.preflight import check_pools

Json = dict[str, Any]

_POOLS: Json = {"prefill": {}, "decode": {}}
_ON_GPUS: Json = {"device": "cuda", "experimental": ["gpu_handoff"]}

MISFITS: dict[str, list[tuple[Json, Json, str]]] = {
    "GatewayConfig._deadlines_agree": [
        (
            {"gateway": {"default_deadline_s": 7200}},
            {"config": {"gateway": {"default_deadline_s": 7200}}},
            r"default_deadline_s( \(7200\))? is over max_deadline_s( \(3600\))?; raise the maximum",
        )
    ],
    "PoolConfig._within_maximum": [
        (
            {"pools": {**_POOLS, "decode": {"replicas": 9, "max_replicas": 8}}},
            {"pools": {"decode": {"replicas": 9}}},
            "raise the maximum",
        )
    ],
    "KvTransferConfig._network_is_kept": [
        (
            {"kv_transfer": {"network": "rdma", "transport": "gloo"}},
            {"config": {"kv_transfer": {"network": "rdma", "transport": "gloo"}}},
            "network is rdma, and transport gloo is TCP; set transport to nixl",
        ),
        (
            {"kv_transfer": {"network": "rdma", "transport": "shared_memory"}},
            {"config": {"kv_transfer": {"network": "rdma", "transport": "shared_memory"}}},
            "network is rdma, and transport shared_memory uses no network; set transport to nixl",
        ),
    ],
    "SessionConfig._reports_in_time": [
        (
            {"session": {"report_s": 3}},
            {"config": {"session": {"report_s": 3}}},
            r"report_s( \(3\))? is over half of silence_s( \(5\))?; lower it or raise silence_s",
        )
    ],
    "RegistryConfig._beats_in_time": [
        (
            {"registry": {"heartbeat_s": 4}, "cluster": {"fence_s": 8}},
            {"config": {"registry": {"heartbeat_s": 4}, "cluster": {"fence_s": 8}}},
            r"heartbeat_s( \(4\))? is over half of ttl_s( \(5\))?; lower it or raise ttl_s",
        )
    ],
    "BatonConfig._somebody_decodes": [
        (
            {"pools": {**_POOLS, "decode": {"replicas": 0}}},
            {"pools": {"decode": {"replicas": 0}}},
            "no pool of role decode has replicas",
        )
    ],
    "BatonConfig._pools_fit": [
        (
            {"pools": {**_POOLS, "decode": {"engine": {"load_format": "dummy"}}}},
            {"pools": {"decode": {"engine": {"load_format": "dummy"}}}},
            "pools.decode.engine.load_format: every pool serves the same weights",
        ),
        (
            {"pools": {**_POOLS, "decode": {"engine": {"block_size": 0}}}},
            {"pools": {"decode": {"engine": {"block_size": 0}}}},
            "block_size",
        ),
    ],
    "BatonConfig._pools_can_pair": [
        (
            {"pools": {**_POOLS, "decode": {"engine": {"block_size": 32}}}},
            {"pools": {"decode": {"engine": {"block_size": 32}}}},
            "block_size differs between pools .*32 in decode.* none could hand a request over",
        )
    ],
    "BatonConfig._gpus_can_hand_over": [
        (
            {"engine": {"device": "cuda"}},
            {"config": {"engine": {"device": "cuda"}}},
            "handing over a GPU's KV is written and was never run; start without prefill workers"
            r"( \(--prefill 0\))?, set engine.device: cpu, or, to try it all the same, "
            r"engine.experimental: \[gpu_handoff\]",
        ),
        (
            {"engine": _ON_GPUS, "pools": {**_POOLS, "decode": {"tensor_parallel_size": 3}}},
            {
                "config": {"engine": _ON_GPUS},
                "pools": {"decode": {"tensorParallelSize": 3}},
            },
            "decode has several ranks, each with KV on a GPU of its own, .* start without prefill "
            r"workers( \(--prefill 0\))?, or give its workers one rank",
        ),
        (
            {"pools": {**_POOLS, "decode": {"engine": _ON_GPUS}}},
            {"pools": {"decode": {"engine": _ON_GPUS}}},
            "engine.device differs between pools .*cuda in decode.* set it for all of them",
        ),
    ],
    "BatonConfig._fence_after_some_beats": [
        (
            {"cluster": {"fence_s": 1.5}},
            {"config": {"cluster": {"fence_s": 1.5}}},
            "workers that are well would be killed; raise it",
        )
    ],
    "check_pools": [
        (
            {"pools": {**_POOLS, "gateway": {"role": "prefill"}}},
            {"pools": {"gateway": {"role": "prefill"}}},
            "its workers would be named like gateways; choose another name",
        )
    ],
}
"""By validator, a misfit for each of its refusals: Baton's settings, the chart's values, and what
both say."""


def _validators() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"check_pools": check_pools}
    for section in vars(baton.config).values():
        if isinstance(section, type) and issubclass(section, BaseModel):
            for name, validator in section.__pydantic_decorators__.model_validators.items():
                found[f"{section.__name__}.{name}"] = validator.func
    return found


def test_every_refusal_of_batons_has_a_misfit_here() -> None:
    refusals = {
        name: sum(
            isinstance(node, ast.Raise)
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(validator))))
        )
        for name, validator in _validators().items()
    }
    assert refusals == {name: len(cases) for name, cases in MISFITS.items()}


@pytest.mark.parametrize("case", [case for cases in MISFITS.values() for case in cases])
def test_what_baton_refuses_helm_refuses(case: tuple[Json, Json, str]) -> None:
    settings, values, sentence = case
    with pytest.raises(ConfigurationError, match=sentence):
        check_pools(parse_config(settings))
    with pytest.raises(helm.HelmError, match=sentence):
        render(GIVEN, values)


BOUNDS: list[tuple[Json, Json]] = [
    ({"gateway": {"default_deadline_s": 3600}}, {"gateway": {"default_deadline_s": 3600.5}}),
    ({"gateway": {"max_deadline_s": 600}}, {"gateway": {"max_deadline_s": 599.5}}),
    ({"session": {"report_s": 2.5}}, {"session": {"report_s": 2.51}}),
    ({"session": {"silence_s": 1}}, {"session": {"silence_s": 0.99}}),
    ({"registry": {"heartbeat_s": 2.5}}, {"registry": {"heartbeat_s": 2.51}}),
    ({"registry": {"ttl_s": 2}}, {"registry": {"ttl_s": 1.99}}),
    ({"cluster": {"fence_s": 2}}, {"cluster": {"fence_s": 1.99}}),
    ({"registry": {"poll_s": 2.5}}, {"registry": {"poll_s": 2.51}}),
    (
        {"registry": {"heartbeat_s": 0.125}, "cluster": {"fence_s": 0.5}},
        {"registry": {"heartbeat_s": 0.125}, "cluster": {"fence_s": 0.49}},
    ),
]
"""Just good enough and just too much, beside a setting that is left to Baton's default."""


@pytest.mark.parametrize(("fit", "misfit"), BOUNDS)
def test_the_chart_knows_batons_defaults(fit: Json, misfit: Json) -> None:
    assert parse_config(fit)
    assert render(GIVEN, {"config": fit})
    with pytest.raises(ConfigurationError):
        parse_config(misfit)
    with pytest.raises(helm.HelmRenderError):
        render(GIVEN, {"config": misfit})
