"""Which device an engine gets, and what is refused by name; on a machine without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_engine import TINY, model_config
from support.tiny_models import write_tiny_llama

from baton.checkpoint.decoder_parts import DecoderParts, LatentConfig, MoeConfig
from baton.config import parse_config
from baton.errors import ConfigurationError
from baton.parallelism import Parallelism
from engine.gpu import device
from engine.gpu.device import obstacle, resolve_device
from engine.quantized import Quantization
from engine.setup import EnginePlan, plan_engine

LATENT = LatentConfig(query_rank=None, kv_rank=4, plain_dim=4, rotary_dim=4, value_dim=4)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As if there was one."""
    monkeypatch.setattr(device, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return torch.device("cuda", 0)


def test_a_gpu_is_taken_where_it_can_be_used(gpu: torch.device) -> None:
    assert resolve_device("cuda", obstacle=None) == gpu
    assert resolve_device("auto", obstacle=None) == gpu
    assert resolve_device("cpu", obstacle=None) == torch.device("cpu")


@pytest.mark.usefixtures("gpu")
def test_what_keeps_a_worker_from_a_gpu_is_said_or_means_the_cpu() -> None:
    assert resolve_device("auto", obstacle="it cannot") == torch.device("cpu")
    with pytest.raises(
        ConfigurationError, match=r"is cuda, but it cannot; set engine\.device: cpu"
    ):
        resolve_device("cuda", obstacle="it cannot")


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "model"))
    wanted = {"model": model, "engine": {"device": "cuda"}, "pools": {"decode": {}}}
    with pytest.raises(ConfigurationError, match=r"engine\.device is cuda, but (this )?torch"):
        plan_engine(parse_config(wanted).for_pool("decode"), secret="s")
    wanted["engine"] = {"device": "auto"}
    assert plan_engine(parse_config(wanted).for_pool("decode"), secret="s").gpu is None


@pytest.mark.parametrize(
    ("parts", "num_ranks", "quantization", "hands_over", "said"),
    [
        (DecoderParts(), 1, "none", False, None),
        (DecoderParts(windows=(7, None)), 1, "none", False, None),
        (DecoderParts(), 2, "none", False, "engine.experimental: [nccl]"),
        (DecoderParts(), 1, "int8", False, "int8"),
        (DecoderParts(moe=MoeConfig(4, 2, 8, True)), 1, "none", False, "mixtures of experts"),
        (DecoderParts(latent=LATENT), 1, "none", False, "latent attention"),
        (DecoderParts(), 1, "none", True, "engine.experimental: [gpu_handoff]"),
    ],
)
def test_what_is_not_built_for_gpus_is_an_obstacle(
    parts: DecoderParts,
    num_ranks: int,
    quantization: Quantization,
    hands_over: bool,
    said: str | None,
) -> None:
    model = replace(model_config(TINY), parts=parts)
    found = obstacle(model, Parallelism(num_ranks, 1), quantization, hands_over=hands_over)
    assert (found is None) if said is None else (said in (found or ""))


@pytest.mark.parametrize(("num_gpus", "said"), [(1, "torch finds 1"), (2, None)])
def test_ranks_that_one_asks_for_all_the_same_need_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    wanted = {"hands_over": False, "experimental": ["nccl"]}
    found = obstacle(model_config(TINY), Parallelism(2), "none", **wanted)
    assert (found is None) if said is None else (said in (found or ""))


@pytest.mark.parametrize(("num_ranks", "said"), [(1, None), (2, "handed to nobody yet")])
def test_a_gpus_kv_is_handed_over_where_one_asks_for_it_and_has_one_rank(
    num_ranks: int, said: str | None
) -> None:
    wanted = {"hands_over": True, "experimental": ["gpu_handoff", "nccl"]}
    found = obstacle(model_config(TINY), Parallelism(num_ranks), "none", **wanted)
    assert (found is None) if said is None else (said in (found or ""))


@pytest.mark.usefixtures("gpu")
def test_a_prefill_worker_is_refused_a_gpu_and_one_on_a_gpu_pairs_with_none_on_a_cpu(
    tmp_path: Path,
) -> None:
    model = str(write_tiny_llama(tmp_path / "model"))

    def plan(role: str, device: str) -> EnginePlan:
        engine = {"device": device, "dtype": "float32", "kv_cache_bytes": 1 << 20}
        pools = {"prefill": {"replicas": 0}, "decode": {}}
        config = parse_config({"model": model, "engine": engine, "pools": pools})
        return plan_engine(config.for_pool(role), secret="s")

    with pytest.raises(ConfigurationError, match="a prefill worker hands its KV over"):
        plan("prefill", "cuda")
    assert plan("prefill", "auto").gpu is None
    own, on_cpu = plan("decode", "cuda"), plan("decode", "cpu")
    assert own.gpu is not None
    assert own.digest != on_cpu.digest
    assert own.engine_layout == on_cpu.engine_layout == on_cpu.layout
