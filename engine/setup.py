"""From a configuration to what a worker's engine needs, sized before it is built."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import cast

import torch

from baton.block_hash import HashDomain, block_key
from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.checkpoint.model_config import ModelConfig
from baton.config import BatonConfig
from baton.errors import ConfigurationError
from baton.kv_layout import KvDtype, KvLayout
from baton.parallelism import Parallelism, check_parallelism
from baton.protocol import PROTOCOL_VERSION
from engine.gpu.device import obstacle, resolve_device
from engine.gpu.plan import GpuPlan
from engine.native.kernels import Choice, Chosen
from engine.parallel.followers import GpuTask, RankTask
from engine.parallel.shard import Shard
from engine.platform import resolve_dtype
from engine.quantized import Quantization


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything about an engine that is known before its memory is taken.

    ``layout`` is that of the memory that all ranks share; ``threads`` are each one's.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    layout: KvLayout
    digest: bytes
    domain: HashDomain
    max_model_len: int
    served_name: str
    threads: int
    cpu_kernels: Choice
    quantization: Quantization
    parallel: Parallelism
    gpu: GpuPlan | None = None
    """None: the CPU computes."""

    def gpu_memory(self) -> torch.Tensor | None:
        """The pool, on the GPU; None where the host has it.

        Raises ConfigurationError where the GPU has too little memory.
        """
        return None if self.gpu is None else self.gpu.memory(self.engine_layout)

    @property
    def engine_layout(self) -> KvLayout:
        """Of the pool that the first rank computes with: on GPUs each rank has its own heads."""
        if self.gpu is None:
            return self.layout
        return Shard(self.parallel).own_layout(self.checkpoint.config, self.layout)

    def rank_task(self, config: BatonConfig, cpu_kernels: Chosen) -> RankTask:
        """What every other rank is told. ``cpu_kernels`` are the leader's: all ranks round
        alike, since all of them route the tokens of an expert layer."""
        return RankTask(
            model=config.model,
            load_format=config.engine.load_format,
            revision=self.checkpoint.revision,
            dtype=self.layout.dtype,
            layout=self.layout,
            threads=self.threads,
            cpu_kernels=cpu_kernels,
            quantization=self.quantization,
            parallel=self.parallel,
            gpu=None if self.gpu is None else GpuTask.of(self.gpu),
        )


def plan_engine(
    config: BatonConfig, *, secret: str, parallel: Parallelism | None = None
) -> EnginePlan:
    """For a worker of ``parallel``'s ranks; by default one.

    Raises CheckpointError and ConfigurationError, before anything large is done.
    """
    parallel = parallel or Parallelism()
    checkpoint = open_checkpoint(config.model, config.engine.load_format)
    model, engine = checkpoint.config, config.engine
    check_parallelism(model, parallel, where=checkpoint.name)
    device = _device(config, model, parallel)
    dtype = resolve_dtype(engine.dtype, device)
    dtype_name = cast(KvDtype, str(dtype).removeprefix("torch."))
    one_block = model.kv_layout(num_blocks=1, block_size=engine.block_size, dtype=dtype_name)
    num_blocks = engine.kv_cache_bytes // one_block.block_bytes - 1
    if num_blocks < 1:
        raise ConfigurationError(
            f"engine.kv_cache_bytes is {engine.kv_cache_bytes}: too small for two blocks of "
            f"{one_block.block_bytes} bytes; raise it"
        )
    limit = engine.max_model_len or model.max_position
    if limit > model.max_position:
        raise ConfigurationError(
            f"engine.max_model_len is {limit}, but {checkpoint.name} was trained for "
            f"{model.max_position} tokens; lower it"
        )
    layout = replace(one_block, num_blocks=num_blocks)
    max_model_len = min(limit, num_blocks * engine.block_size)
    return EnginePlan(
        checkpoint=checkpoint,
        dtype=dtype,
        layout=layout,
        digest=layout.digest(
            weights_revision=checkpoint.revision,
            # No transport leads from a GPU to a host's memory: such digests are not to match.
            generation=config.generation + ("" if device.type == "cpu" else " on a GPU"),
            protocol_version=PROTOCOL_VERSION,
        ),
        domain=HashDomain(
            key=block_key(secret),
            weights_revision=checkpoint.revision,
            kv_dtype=dtype_name,
        ),
        max_model_len=max_model_len,
        served_name=config.served_model_name or checkpoint.name,
        threads=engine.threads or max(1, len(os.sched_getaffinity(0)) // parallel.num_ranks),
        cpu_kernels=engine.cpu_kernels,
        quantization=engine.quantization,
        parallel=parallel,
        gpu=None
        if device.type == "cpu"
        else GpuPlan(device, engine.gpu_attention, engine.max_num_seqs, max_model_len),
    )


def _device(config: BatonConfig, model: ModelConfig, parallel: Parallelism) -> torch.device:
    """Raises ConfigurationError where a GPU is asked for and cannot be had or used."""
    roles = {pool.role for pool in config.pools.values()}
    hindrance = obstacle(
        model,
        parallel,
        config.engine.quantization,
        hands_over=roles == {"prefill"},
        experimental=config.engine.experimental,
    )
    return resolve_device(config.engine.device, obstacle=hindrance)
