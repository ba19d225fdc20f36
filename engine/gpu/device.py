"""Which device an engine computes on, and what keeps it from a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Literal

import torch

from baton.checkpoint.model_config import ModelConfig
from baton.errors import ConfigurationError
from baton.parallelism import Parallelism
from engine.quantized import Quantization

DeviceName = Literal["auto", "cpu", "cuda"]
GpuAttention = Literal["auto", "triton", "flashinfer"]
CPU = torch.device("cpu")


def resolve_device(name: DeviceName, *, obstacle: str | None) -> torch.device:
    """For the setting ``engine.device``. ``obstacle`` says, as a clause, why this worker could
    not use a GPU if there were one; None where it could.

    Raises:
        ConfigurationError: a GPU is asked for and cannot be had.
    """
    if name == "cpu":
        return CPU
    found = _missing() or obstacle
    if found is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "auto":
        return CPU
    raise ConfigurationError(f"engine.device is cuda, but {found}; set engine.device: cpu")


def obstacle(
    model: ModelConfig,
    parallel: Parallelism,
    quantization: Quantization,
    *,
    hands_over: bool,
    experimental: Collection[str] = (),
) -> str | None:
    """What of a worker is not built for GPUs, as a clause; None where all of it is.

    ``hands_over``: others are to read its KV. ``experimental`` is the setting of that name.
    """
    if hands_over and "gpu_handoff" not in experimental:
        return (
            "a prefill worker hands its KV over, which from a GPU was never run; to try it all the "
            "same, set engine.experimental: [gpu_handoff]"
        )
    if hands_over and parallel.num_ranks > 1:
        return "the KV of several ranks, each on a GPU of its own, is handed to nobody yet"
    if parallel.num_ranks > 1 and "nccl" not in experimental:
        return (
            "the ranks of a worker would compute together over NCCL, which was never run; to try "
            "it all the same, set engine.experimental: [nccl]"
        )
    if parallel.num_ranks > 1 and parallel.num_ranks > torch.cuda.device_count():
        return (
            f"{parallel.num_ranks} ranks need a GPU each, and torch finds "
            f"{torch.cuda.device_count()}"
        )
    if quantization != "none":
        return f"weights in {quantization} are multiplied on CPUs only"
    if model.parts.moe is not None:
        return "mixtures of experts are computed on CPUs only"
    if model.parts.latent is not None:
        return "latent attention is computed on CPUs only"
    return None


def preferred_gpu_dtype() -> torch.dtype:
    """bfloat16 where the GPU multiplies in it (compute capability 8.0 and later)."""
    has_bfloat16 = torch.cuda.get_device_capability()[0] >= 8
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    return None
