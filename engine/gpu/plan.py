"""What an engine needs to know to compute on a GPU, and how its parts are made there.

Nothing here imports triton before an engine is built for a GPU: a CPU does without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from engine.gpu.device import GpuAttention
from engine.parallel.group import RankGroups
from engine.weights.on_demand import OnDemand

if TYPE_CHECKING:
    from engine.attention.interface import Attention
    from engine.attention.triton_paged import TritonPagedAttention
    from engine.gpu.steps import GpuSteps
    from engine.models.decoder import Decoder
    from engine.parallel.followers import Followers


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """``attention`` is the setting ``engine.gpu_attention``. Decodes of up to ``max_num_seqs``
    sequences are recorded as CUDA graphs; none is longer than ``max_model_len``."""

    device: torch.device
    attention: GpuAttention = "auto"
    max_num_seqs: int = 64
    max_model_len: int = 8192

    def memory(self, layout: KvLayout) -> Tensor:
        """A pool of the GPU's memory, zeroed, for ``KvCache``.

        Raises:
            ConfigurationError: there is not so much of it free.
        """
        try:
            return torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError:
            free, _ = torch.cuda.mem_get_info(self.device)
            raise ConfigurationError(
                f"{layout.num_bytes} bytes of KV cache do not fit in the {free} that the GPU has "
                "free; lower engine.kv_cache_bytes"
            ) from None

    def weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same on the GPU, each copied when it is asked for."""

        def make(name: str) -> Tensor:
            return weights[name].to(self.device)

        return OnDemand(weights, make)

    def steps(
        self,
        model: Decoder,
        config: ModelConfig,
        layout: KvLayout,
        pool: Tensor,
        *,
        groups: RankGroups,
        followers: Followers | None = None,
    ) -> GpuSteps:
        """Records the graphs of decodes, which takes seconds. Of several ranks, all of which do
        so together, ``groups`` are this one's; the first has ``followers``.

        ``pool`` ([blocks, KV heads, ...], ``layout.shape``) has this rank's heads.

        Raises:
            ConfigurationError: the attention that is asked for does not take this model.
        """
        from engine.attention.triton_paged import TritonPagedAttention
        from engine.gpu.steps import GpuSteps

        query_heads = groups.shard.query_heads(config)
        decodes = TritonPagedAttention(
            layout,
            pool,
            query_heads.stop - query_heads.start,
            config.parts.windows,
            scale=config.attention_scale,
        )
        return GpuSteps(
            model,
            self._attention(decodes),
            decodes,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            groups=groups,
            followers=followers,
        )

    def _attention(self, triton: TritonPagedAttention) -> Attention:
        if self.attention == "triton":
            return triton
        from engine.attention.flashinfer_paged import FlashInferPagedAttention, refusal

        refused = refusal(triton.layout)
        if refused is None and importlib.util.find_spec("flashinfer") is None:
            refused = "the package flashinfer is missing"
        if refused is None:
            return FlashInferPagedAttention(triton)
        if self.attention == "auto":
            return triton
        raise ConfigurationError(
            f"engine.gpu_attention is flashinfer, but {refused}; set engine.gpu_attention: triton"
        )
