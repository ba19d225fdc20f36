"""Random weights of a model's shapes: they cost what real ones cost, and say nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from baton.checkpoint.model_config import ModelConfig
from engine.weights.on_demand import OnDemand
from engine.weights.tensor_shapes import Shape, dtype_of, expected_shapes


def dummy_tensors(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> Mapping[str, torch.Tensor]:
    """All tensors of the model by their Hugging Face names; a pure function of the arguments. They
    lie on ``device``, by default the CPU: a GPU draws others, and a hundred times as fast.

    Each is drawn by itself when it is asked for, so who needs some of them gets the same.
    """
    shapes = expected_shapes(config)

    def make(name: str) -> torch.Tensor:
        return _draw(name, shapes[name], seed, device).to(dtype_of(name, dtype))

    return OnDemand(shapes, make)


def _draw(name: str, shape: Shape, seed: int, device: torch.device | None) -> torch.Tensor:
    """Norms of 1; of matrices, outputs that are about as large as the inputs."""
    if len(shape) == 1 and not name.endswith("bias"):
        return torch.ones(shape, device=device)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    bound = (3 / shape[-1]) ** 0.5 if len(shape) > 1 else 0.1
    return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
