"""One step as the leader tells it to its followers: little-endian int32 numbers.

    | counts | token ids | positions | slots | sampled rows | spans | block table |

``counts`` are the numbers of tokens, sampled rows, spans, blocks of the widest span, and
decodes; each span is three numbers. An empty message is the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import Batch, Span

END = b""
_NUM_COUNTS = 5


def encode_step(batch: Batch, sampled_rows: Tensor) -> bytes:
    spans = [(span.first_row, span.num_tokens, span.num_context) for span in batch.spans]
    counts = [
        len(batch.token_ids),
        len(sampled_rows),
        len(spans),
        batch.block_table.shape[1],
        batch.num_decodes,
    ]
    parts = [
        torch.tensor(counts),
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        sampled_rows,
        torch.tensor(spans).view(-1),
        batch.block_table.view(-1),
    ]
    return torch.cat([part.to(torch.int32) for part in parts]).numpy().tobytes()


def decode_step(message: bytes) -> Batch:
    """The same step, without its sequences."""
    numbers = torch.frombuffer(bytearray(message), dtype=torch.int32)
    counts: list[int] = numbers[:_NUM_COUNTS].tolist()
    num_tokens, num_sampled, num_spans, width, num_decodes = counts
    lengths = [num_tokens, num_tokens, num_tokens, num_sampled, 3 * num_spans, num_spans * width]
    parts = torch.split_with_sizes(numbers[_NUM_COUNTS:], lengths)
    token_ids, positions, slots, rows, spans, table = parts
    return Batch(
        token_ids=token_ids.long(),
        positions=positions.long(),
        slot_mapping=slots.long(),
        block_table=table.view(num_spans, width),
        spans=tuple(Span(*span) for span in spans.view(-1, 3).tolist()),
        num_decodes=num_decodes,
        sampled=(),
        sampled_rows=rows.long(),
    )
