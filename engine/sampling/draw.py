"""Draws the next token of each row: greedily, or as a pure function of its place.

A row's randomness is one uniform number that depends on (seed, choice index,
position) and nothing else: not on the batch, not on the worker, not on history.
So a sequence that is computed again elsewhere draws the same tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.errors import InternalError
from engine.logits import Logits
from engine.native.draw import NO_DISTRIBUTION, draw_tokens
from engine.native.kernels import kernels
from engine.sampling.params import SamplingParams

_MASK_64 = (1 << 64) - 1
LEAST_TEMPERATURE = 1e-30
"""Above float32's subnormal numbers; any one this low leaves the maximum alone."""

NUM_CANDIDATES = 256
"""Tokens sorted at first; of rows whose support may reach further ``_MORE`` times as many
are, and then all. Sorting 49,152 tokens takes about 20 times as long as selecting 256."""
_MORE = 16

_BLOCK = 256
"""Columns that are summed at once. Running sums of blocks, and of the columns of one of
them, take a tenth of the time of running sums of all columns."""


def draw(logits: Logits, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token id per row of ``logits``, which stay as they are.

    ``positions`` count emitted tokens from 0. Temperature 0 takes the highest
    logit, the lowest id among equals. Otherwise the distribution is
    softmax(logits / temperature); ``min_p`` keeps the tokens that are at least so
    many times as likely as the likeliest (Nguyen et al., 2024), then ``top_k`` its k
    likeliest, and then ``top_p`` the fewest likeliest whose share of the rest reaches
    p (Holtzman et al., 2020), lower ids first among equals and never fewer than one.
    This order is vLLM's (``Sampler`` in its ``vllm/v1/sample/sampler.py``). The token is
    the inverse, at the row's uniform number, of the cumulative distribution in
    order of token ids (float64). A row's token depends neither on the others nor on the
    number of threads; the CPU kernel's weights may differ from torch's in their last bits,
    so its token may where the uniform number is as close as that to where one token's
    share ends.

    Raises InternalError where logits are NaN, or the highest is infinite, and no token can
    be drawn; the greedy one of a row with NaN is the first of these.
    """
    values = logits.values
    assert len(values) == len(params) == len(positions)
    uniforms = [
        uniform(param, position) if param.temperature > 0 else 0.0
        for param, position in zip(params, positions, strict=True)
    ]
    native = kernels()
    if native is not None:
        return draw_tokens(native, logits, params, uniforms)
    drawn = [row for row, param in enumerate(params) if param.temperature > 0]
    is_greedy = len(drawn) < len(params)
    token_ids: list[int] = values.argmax(dim=-1).tolist() if is_greedy else [0] * len(params)
    if drawn:
        rows = values[drawn] if is_greedy else values
        chosen = _draw(rows, [params[row] for row in drawn], [uniforms[row] for row in drawn])
        for row, token_id in zip(drawn, chosen, strict=True):
            token_ids[row] = token_id
    return token_ids


def uniform(params: SamplingParams, position: int) -> float:
    """A uniform number in [0, 1): the leading 53 bits of BLAKE2b (RFC 7693),
    personalized ``baton-sample``, over (seed, choice index, position) as unsigned
    64-bit little-endian numbers."""
    place = struct.pack("<QQQ", params.seed & _MASK_64, params.choice_index, position)
    digest = hashlib.blake2b(place, digest_size=8, person=b"baton-sample").digest()
    return float(int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _draw(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    temperature = torch.tensor([[max(p.temperature, LEAST_TEMPERATURE)] for p in params])
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    highest = logits.amax(dim=-1, keepdim=True)
    if not bool(highest.isfinite().all()):
        raise InternalError(NO_DISTRIBUTION)
    weights = (logits - highest).div_(temperature).exp_()
    _drop_unlikely(weights, params)
    target = torch.tensor(uniforms, dtype=torch.float64)
    chosen = invert(weights, target)
    limit = Limit.of(params, logits.shape[1])
    cut = limit.rows_in_force(logits.shape[1])
    if len(cut):
        chosen[cut] = _draw_likeliest(logits[cut], weights[cut], limit.of_rows(cut), target[cut])
    token_ids: list[int] = chosen.tolist()
    return token_ids


def _drop_unlikely(weights: Tensor, params: list[SamplingParams]) -> None:
    """Makes the weights below min_p zero; the largest of each row is 1."""
    rows = [row for row, param in enumerate(params) if param.min_p > 0]
    if rows:
        least = torch.tensor([[params[row].min_p] for row in rows])
        kept = weights[rows]
        weights[rows] = kept.masked_fill_(kept < least, 0.0)


def invert(weights: Tensor, target: Tensor) -> Tensor:
    """The first column at which each row's cumulative share exceeds ``target``, [rows]."""
    missing = -weights.shape[1] % _BLOCK
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    blocks = padded.view(len(weights), -1, _BLOCK)
    reached = torch.nn.functional.pad(
        blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1), (1, 0)
    )
    # A number of 53 bits below 1 times a total is, rounded, below that total.
    bound = target[:, None] * reached[:, -1:]
    block = torch.searchsorted(reached[:, 1:].contiguous(), bound, right=True)
    within = blocks[torch.arange(len(weights)), block[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    # The block's sum, in another order, may be rounded to a little more than ``within`` reaches.
    last = torch.nextafter(within[:, -1:], torch.zeros_like(bound))
    rest = torch.minimum(bound - reached.gather(1, block), last)
    return (block * _BLOCK + torch.searchsorted(within, rest, right=True))[:, 0]


@dataclass(frozen=True, slots=True)
class Limit:
    """top_k (int64, the vocabulary's size where off) and top_p (float64) of each row."""

    top_k: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, params: list[SamplingParams], vocab_size: int) -> Limit:
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        top_p = [p.top_p for p in params]
        return cls(torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64))

    def of_rows(self, rows: Tensor) -> Limit:
        return Limit(self.top_k[rows], self.top_p[rows])

    def rows_in_force(self, vocab_size: int) -> Tensor:
        return ((self.top_k < vocab_size) | (self.top_p < 1.0)).nonzero()[:, 0]


def _draw_likeliest(logits: Tensor, weights: Tensor, limit: Limit, target: Tensor) -> Tensor:
    """Token ids drawn within ``limit``, [rows]; all else is [rows] or [rows, vocabulary]."""
    vocab_size = logits.shape[1]
    largest = max((k for k in limit.top_k.tolist() if k < vocab_size), default=0)
    num_candidates = max(NUM_CANDIDATES, largest + 1)
    chosen = torch.empty(len(logits), dtype=torch.int64)
    unsure = torch.arange(len(logits))
    while len(unsure):
        token_ids, num_certain = candidates(logits[unsure], num_candidates)
        inside = supported(weights[unsure], token_ids, limit.of_rows(unsure))
        chosen[unsure] = invert_in_id_order(weights[unsure], token_ids, inside, target[unsure])
        unsure = unsure[inside.sum(dim=-1) > num_certain]
        num_candidates *= _MORE
    return chosen


def candidates(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The highest logits of each row in falling order, lower ids first among equals.

    Returns their token ids, [rows, num_candidates], and how many of them, [rows],
    certainly have no equal or better one outside.
    """
    num_rows, vocab_size = logits.shape
    if num_candidates >= vocab_size:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        return order, torch.full((num_rows,), vocab_size, device=logits.device)
    token_ids = logits.topk(num_candidates, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
    num_certain = (values > values[:, -1:]).sum(dim=-1)
    return token_ids.gather(1, order), num_certain


def supported(weights: Tensor, token_ids: Tensor, limit: Limit) -> Tensor:
    """Which of ``token_ids`` (likeliest first) belong to the support, bool of its shape."""
    inside = torch.arange(token_ids.shape[1], device=weights.device) < limit.top_k[:, None]
    reached = (weights.gather(1, token_ids) * inside).cumsum(dim=-1, dtype=torch.float64)
    # Where top_k is off, the share is one of the whole vocabulary.
    is_off = limit.top_k == weights.shape[1]
    whole = weights.sum(dim=-1, dtype=torch.float64)
    total = torch.where(is_off, whole, reached[:, -1])
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    inside &= before < limit.top_p[:, None] * total[:, None]
    inside[:, 0] = True
    return inside


def invert_in_id_order(
    weights: Tensor, token_ids: Tensor, inside: Tensor, target: Tensor
) -> Tensor:
    """Like ``invert``, over the tokens ``inside`` alone, in order of their ids."""
    in_order, order = token_ids.sort(dim=-1)
    kept = (weights.gather(1, token_ids) * inside).gather(1, order)
    return in_order.gather(1, invert(kept, target)[:, None])[:, 0]
