"""FlashInfer's wrapper for paged prefill as its documentation has it, in plain torch.

https://docs.flashinfer.ai/api/attention.html: rows ``qo_indptr[i]`` to ``qo_indptr[i + 1]`` are
those of request i, its pages ``paged_kv_indices[paged_kv_indptr[i] : paged_kv_indptr[i + 1]]``, of
which the last holds ``paged_kv_last_page_len[i]`` tokens; its queries are the last of its tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, backend: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert (kv_layout, backend) == ("HND", "fa2")

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(array.dtype == torch.int32 for array in arrays)
        assert causal
        assert q_data_type == kv_data_type == torch.bfloat16
        self._arrays = [array.tolist() for array in arrays]
        self._heads = num_qo_heads, num_kv_heads
        self._head_dim, self._page_size = head_dim_qk, page_size
        self._scale, self._window_left = sm_scale, window_left

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        rows, pages, indices, last_lengths = self._arrays
        keys, values = paged_kv_cache
        assert keys.stride() == values.stride()
        assert keys.stride(-1) == 1
        assert keys.shape[1:] == (self._heads[1], self._page_size, self._head_dim)
        assert q.shape == out.shape == (rows[-1], self._heads[0], self._head_dim)
        for index, last_length in enumerate(last_lengths):
            own = indices[pages[index] : pages[index + 1]]
            length = (len(own) - 1) * self._page_size + last_length
            mine = slice(rows[index], rows[index + 1])
            out[mine] = self._attend(
                q[mine], _joined(keys[own], length), _joined(values[own], length)
            )
        return out

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        group = self._heads[0] // self._heads[1]
        keys, values = (each.repeat_interleave(group, dim=0) for each in (keys, values))
        scores = torch.einsum("qhd,hkd->hqk", query.double(), keys) * self._scale
        at = torch.arange(keys.shape[1])
        own = at[-len(query) :, None]
        visible = at <= own
        if self._window_left >= 0:
            visible &= at >= own - self._window_left
        scores = scores.masked_fill(~visible, -math.inf)
        return torch.einsum("hqk,hkd->qhd", scores.softmax(-1), values).to(query.dtype)


def _joined(pages: Tensor, length: int) -> Tensor:
    """[pages, heads, tokens, dim] → float64 [heads, length, dim]."""
    heads, dim = pages.shape[1], pages.shape[3]
    return pages.transpose(0, 1).reshape(heads, -1, dim)[:, :length].double()
