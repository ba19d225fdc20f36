"""One model on one device: weights, KV cache and attention, advanced by synchronous steps.

Of several ranks that compute a model together this is the first: it alone has sequences,
blocks and logits (docs/adr/0011-ranks-of-a-worker.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch

from baton.block_hash import HashDomain
from baton.checkpoint.checkpoint import Checkpoint
from baton.heap import release_free_memory
from baton.kv_layout import KvLayout
from engine.attention.paged_cpu import attention_of
from engine.batch import Batch, Batches, build_batch
from engine.gpu.plan import GpuPlan
from engine.kv_cache.kv_cache import KvCache
from engine.logits import Logits
from engine.models.decoder import Decoder
from engine.native.kernels import Choice, use_kernels
from engine.parallel.followers import Followers
from engine.parallel.group import RankGroups
from engine.platform import let_go_of_file_pages
from engine.quantized import Quantization
from engine.sampling.sampler import sample
from engine.sequence import Sampled, Scheduled
from engine.weights.load import load_weights
from engine.weights.tensor_shapes import EMBEDDING

__all__ = ["Engine", "Sampled", "Scheduled"]


class Engine:
    """Computes sequences whose blocks the caller has taken from ``kv``.

    ``memory`` is the KV pool's, as ``KvCache`` has it. ``weights``, by their Hugging
    Face names, stand in for those of the checkpoint. ``threads`` are torch's compute
    threads for the whole process; 0 leaves them as they are. ``cpu_kernels`` and
    ``quantization`` are as the settings of these names. ``followers`` are the other ranks, if
    there are any; they write their heads into the same memory. With a ``gpu`` everything lies and
    is computed there, ``memory`` too, which then has the first rank's heads. Not thread-safe.

    Raises CheckpointError for weights that cannot be loaded, ConfigurationError for kernels
    that are asked for and cannot be had, or a model that a GPU's do not compute.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        layout: KvLayout,
        memory: memoryview | torch.Tensor,
        domain: HashDomain,
        threads: int = 0,
        cpu_kernels: Choice = "torch",
        quantization: Quantization = "none",
        weights: Mapping[str, torch.Tensor] | None = None,
        followers: Followers | None = None,
        gpu: GpuPlan | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        use_kernels("torch" if gpu is not None else cpu_kernels)
        config = checkpoint.config
        self.vocab_size = config.vocab_size
        self.max_position = config.max_position
        self.kv = KvCache(layout, memory, domain)
        self._batches = Batches(layout)
        self._followers = followers
        groups = followers.groups if followers is not None else RankGroups()
        with torch.inference_mode():
            device = gpu.device if gpu is not None else None
            weights = weights or load_weights(checkpoint, dtype, device)
            if gpu is not None:
                weights = gpu.weights(weights)
            self._model = Decoder(config, weights, groups, quantization)
            self._gpu = None
            if gpu is not None:
                self._gpu = gpu.steps(
                    self._model, config, layout, self.kv.tensor, groups=groups, followers=followers
                )
            else:
                self._attention = attention_of(config, layout, self.kv.tensor, groups)
            self.kv.zeroes_new_blocks = gpu is None and self._attention.reads_behind
        if gpu is None:  # the weights were laid out anew; the embedding is read where it lies
            let_go_of_file_pages(weights[EMBEDDING])
        release_free_memory()
        if followers is not None:
            followers.wait_ready()

    @torch.inference_mode()
    def step(self, scheduled: SequenceOf[Scheduled]) -> list[Sampled]:
        """Computes the next ``num_tokens`` of each sequence in one forward pass.

        The caller has called ``kv.ensure_blocks`` for every one. Blocks that become
        full are published. A sequence whose input is then complete gets a sampled
        token appended (its KV is not computed yet); these are returned, in the order
        scheduled. An exception leaves every sequence as it was, unless a GPU has failed: then
        the process has to end.
        """
        if not scheduled:
            return []
        if self._gpu is not None:
            pending = self._gpu.begin(scheduled)
            self._advance(scheduled)  # while the GPU computes
            return self._append(pending.wait())
        batch = self._batches.build(scheduled)
        logits = self._forward(batch, batch.sampled_rows)
        sampled = sample(logits, batch.sampled)
        self._advance(scheduled)
        return self._append(sampled)

    def _advance(self, scheduled: SequenceOf[Scheduled]) -> None:
        for item in scheduled:
            item.seq.num_computed_tokens += item.num_tokens
            self.kv.publish(item.seq)

    def _append(self, sampled: list[Sampled]) -> list[Sampled]:
        for drawn in sampled:
            drawn.seq.token_ids.append(drawn.token_id)
        return sampled

    @torch.inference_mode()
    def score(self, scheduled: Scheduled) -> torch.Tensor:
        """Logits of the next ``num_tokens`` tokens of one sequence, teacher-forced.

        Float32 [num_tokens, vocabulary], on the engine's device: row i follows from the tokens up
        to and with the i-th. As in ``step`` the caller has called ``kv.ensure_blocks``, and the
        tokens' KV is there afterwards; nothing is sampled. For evaluation.
        """
        batch = build_batch([scheduled], self.kv.layout)
        rows = torch.arange(scheduled.num_tokens)
        logits = self._forward(batch, rows)
        scheduled.seq.num_computed_tokens += scheduled.num_tokens
        self.kv.publish(scheduled.seq)
        return logits.values.clone()  # the next step's take their place

    def _forward(self, batch: Batch, rows: torch.Tensor) -> Logits:
        if self._gpu is not None:
            return Logits(self._gpu.logits(batch, rows))
        if self._followers is not None:
            self._followers.send(batch, rows)
        attention = self._attention.begin(batch)
        return self._model.forward(batch.token_ids, batch.positions, rows, attention)
