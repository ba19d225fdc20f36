"""An engine's steps on a GPU: inputs go there, sampled token ids come back, and nothing else.

1. ``begin`` copies a step's inputs from page-locked memory, launches its forward pass and the
   draw of its tokens, and the copy of their ids to the host. It waits for nothing.
2. The host does what does not depend on the tokens: it publishes full blocks, and prepares the
   inputs of a next step of the same decodes.
3. ``PendingStep.wait`` returns them, when all of the step is done: the one moment at which the
   host waits.

Steps of decodes alone are CUDA graphs (``graphs.py``) up to ``max_num_seqs`` sequences; others,
and larger ones, are launched kernel by kernel.

Of several ranks the first tells the others each step, and all launch the same for it: whether it
is a graph, and which row is whose, follows from what they are told.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.attention.interface import Attention
from engine.attention.triton_paged import TritonPagedAttention
from engine.batch import Batch, build_batch
from engine.gpu.decode_inputs import DecodeInputs
from engine.gpu.graphs import DecodeGraphs
from engine.gpu.transfers import to_device
from engine.models.decoder import Decoder
from engine.parallel.group import RankGroups
from engine.sampling.on_device import PendingSample, begin_sample
from engine.sampling.params import SamplingParams
from engine.sequence import Sampled, Scheduled, Sequence

if TYPE_CHECKING:
    from engine.parallel.followers import Followers


# Its stubs have no types for events.
_cuda: Any = torch.cuda


class GpuSteps:
    """``decodes`` is the attention of graphs, ``attention`` that of all other steps."""

    def __init__(
        self,
        model: Decoder,
        attention: Attention,
        decodes: TritonPagedAttention,
        *,
        max_num_seqs: int,
        max_model_len: int,
        groups: RankGroups,
        followers: Followers | None = None,
    ) -> None:
        layout = decodes.layout
        self._has_others = groups.world.size > 1
        self._followers = followers
        self._layout = layout
        self._device = decodes.device
        self._model = model
        self._attention = attention
        self._decodes = decodes
        self._inputs = DecodeInputs(
            layout,
            self._device,
            max_num_seqs=max_num_seqs,
            max_blocks=min(layout.num_blocks, layout.num_blocks_for(max_model_len)),
        )
        self._graphs = DecodeGraphs(self._decode_rows, most=max_num_seqs)
        if self._device.type == "cuda":
            self.warm_up()
            self._graphs.record()

    def warm_up(self) -> None:
        """Computes a short prompt that nobody asked for, in the scratch block: the kernels of
        chunks are compiled, which takes seconds, before somebody does."""
        length = 2 * self._layout.block_size + 1
        seq = Sequence(None, [0] * length, length, SamplingParams(seed=0), b"")
        seq.block_table = [self._layout.scratch_block] * self._layout.num_blocks_for(length)
        batch = build_batch([Scheduled(seq, length)], self._layout)
        self._launch(batch, batch.sampled_rows)

    def begin(self, scheduled: SequenceOf[Scheduled]) -> PendingStep:
        """Of at least one sequence; each holds the blocks it needs."""
        sequences = [item.seq for item in scheduled]
        if (
            self._has_others
            or len(sequences) > self._inputs.max_num_seqs
            or any(seq.num_remaining != 1 or seq.num_emitted_tokens == 0 for seq in sequences)
        ):
            batch = build_batch(scheduled, self._layout)
            logits = self.logits(batch, batch.sampled_rows)
            sample = begin_sample(logits, batch.sampled)
            return PendingStep(sample, range(len(batch.sampled)), Launched(self._device))
        rows = self._inputs.fill(sequences)
        by_row = [seq for _, seq in sorted(zip(rows, sequences, strict=True), key=_first)]
        sample = begin_sample(self._graphs.run(len(by_row)), by_row)
        pending = PendingStep(sample, rows, Launched(self._device))
        self._inputs.prepare(sequences, rows)  # while the GPU computes
        return pending

    def logits(self, batch: Batch, rows: Tensor) -> Tensor:
        """Float32 [len(rows), vocabulary], on the GPU; ``batch`` and ``rows`` are on the host.
        The next step overwrites them. The other ranks are told."""
        if self._followers is not None:
            self._followers.send(batch, rows)
        return self.compute(batch, rows) if self._has_others else self._launch(batch, rows)

    def compute(self, batch: Batch, rows: Tensor) -> Tensor:
        """What every rank computes of a step, as ``logits``; ranks but the first get none."""
        num_rows = len(batch.spans)
        if not len(rows) == batch.num_decodes == num_rows <= self._inputs.max_num_seqs:
            return self._launch(batch, rows)
        self._inputs.show(batch)
        logits = self._graphs.run(num_rows)
        return logits[to_device(rows, self._device)] if len(logits) else logits

    def _launch(self, batch: Batch, rows: Tensor) -> Tensor:
        attention = self._attention.begin(batch)
        device = self._device
        return self._model.forward(
            to_device(batch.token_ids, device),
            to_device(batch.positions, device),
            to_device(rows, device),
            attention,
        ).values

    def _decode_rows(self, size: int) -> Tensor:
        inputs = self._inputs
        attention = self._decodes.decodes(
            inputs.slots[:size], inputs.block_table[:size], inputs.contexts[:size]
        )
        every = torch.arange(size, device=self._device)
        return self._model.forward(
            inputs.token_ids[:size], inputs.positions[:size], every, attention
        ).values


class Launched:
    """All that has been launched on the device's current stream until now."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = _cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Returns when the device has done it."""
        if self._event is not None:
            self._event.synchronize()


class PendingStep:
    """A step whose tokens are on their way; ``order`` has the row of each, as scheduled."""

    def __init__(self, sample: PendingSample, order: SequenceOf[int], launched: Launched) -> None:
        self._sample = sample
        self._order = order
        self._launched = launched

    def wait(self) -> list[Sampled]:
        """In the order scheduled. The step's KV is written then, also where nothing is drawn:
        others are told of it, and its blocks may be given to others."""
        sampled = self._sample.wait()
        self._launched.wait()
        return [sampled[row] for row in self._order]


def _first(pair: tuple[int, object]) -> int:
    return pair[0]
