"""The CPU kernels of kernels.cpp and its headers, for tensors.

Whether a process has them is decided once, by ``use_kernels``. Where ``kernels()`` is None, who
would call them computes the same with torch.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from engine.native.build import find_library
from engine.native.huge_pages import HugePages

logger = logging.getLogger(__name__)

Choice = Literal["auto", "native", "torch"]
Chosen = Literal["native", "torch"]

PANEL = 32
"""Outputs whose weights lie together: ``kPanel`` in products.h, ``kTold`` in weights.h."""
_ROWS = 12
"""That go through the weights together: ``kMostRows`` there."""
_LONG_WORK = 1 << 20
"""Elements that are read: from some 0.1 ms on."""
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Pool(Structure):
    """A KV pool's memory, and which of its heads are this process's: the fields of ``Pool``
    in decodes.h, in their order."""

    _fields_ = (
        ("data", c_void_p),
        ("num_pool_heads", c_int64),
        ("num_layers", c_int64),
        ("num_parts", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
        ("first_head", c_int64),
        ("num_heads", c_int64),
    )

    @classmethod
    def of(cls, layout: KvLayout, kv: Tensor, *, value_dim: int, own_heads: range) -> Pool:
        """``kv`` ([blocks, heads, layers, parts, tokens, head_dim]) has to outlive it."""
        assert kv.is_contiguous()
        return cls(
            kv.data_ptr(),
            layout.num_kv_heads,
            layout.num_layers,
            layout.num_kv_parts,
            layout.block_size,
            layout.head_dim,
            value_dim,
            own_heads.start,
            len(own_heads),
        )


class _Function:
    """One of the library's. Short calls keep the interpreter's lock: another thread would take
    it in between, for much longer than they last. Long ones let others run."""

    def __init__(
        self,
        name: str,
        arguments: tuple[Any, ...],
        locked: ctypes.CDLL,
        unlocked: ctypes.CDLL,
        result: Any = None,
    ) -> None:
        self._locked, self.unlocked = (getattr(each, name) for each in (locked, unlocked))
        for function in (self._locked, self.unlocked):
            function.argtypes, function.restype = arguments, result

    def for_work(self, num_elements: int) -> Any:
        """To call it on so many."""
        return self._locked if num_elements < _LONG_WORK else self.unlocked


_ByDtype = dict[torch.dtype, _Function]


class Kernels:
    """Tensors are on the CPU; activations are bfloat16 or float32, computed in float32."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.PyDLL(str(path))  # whose calls keep the interpreter's lock
            unlocked = ctypes.CDLL(str(path))
        except OSError as error:
            raise ConfigurationError(f"the CPU kernels cannot be loaded: {error}") from error

        def by_dtype(name: str, *arguments: Any) -> _ByDtype:
            return {
                dtype: _Function(f"{name}_{suffix}", arguments, library, unlocked)
                for dtype, suffix in _SUFFIXES.items()
            }

        norm = (c_void_p, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int)
        self._norm = by_dtype("add_rms_norm", *norm)
        self._norm_of_float32 = _Function("add_rms_norm_f32_bf16", norm, library, unlocked)
        self._swiglu = by_dtype("swiglu", c_void_p, c_void_p, c_int64, c_int64, c_int)
        self._rotate = by_dtype(
            *("rotate", c_void_p, c_int64, c_int64, c_void_p, c_void_p),
            *(c_int64, c_int64, c_int64, c_int),
        )
        self._norm_heads = by_dtype(
            *("norm_heads", c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_int64, c_int)
        )
        self._write_kv = by_dtype(
            "write_kv", POINTER(Pool), c_int64, c_void_p, c_int64, c_void_p, c_int64
        )
        self._attend = by_dtype(
            *("attend_decodes", POINTER(Pool), c_int64, c_void_p, c_int64, c_void_p, c_void_p),
            *(c_int64, c_void_p, c_int64, c_int64, c_float, c_int64, c_int),
        )

        self._libraries = library, unlocked
        self._weights = HugePages()
        self._pack = self._multiply = None
        if hasattr(library, "pack_panels"):
            pack = (c_void_p, c_void_p, c_int64, c_int64, c_int)
            product = (*(c_void_p,) * 5, c_int64, c_int64, c_int64, c_int)
            self._pack = _Function("pack_panels", pack, library, unlocked)
            self._multiply = by_dtype("multiply_panels", *product)
            chunk = (
                *(POINTER(Pool), c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
                *(c_int64, c_int64, c_int64, c_float, c_int64, c_int),
            )
            self._attend_chunk = _Function("attend_chunk", chunk, library, unlocked)

    def function(self, name: str, *arguments: Any, result: Any = None) -> _Function:
        """One of the library's, for who calls it by himself."""
        return _Function(name, arguments, *self._libraries, result)

    def panels(self, weight: Tensor) -> Tensor | None:
        """``weight`` ([outputs, inputs]) as ``multiply`` reads it: a copy of the same size.

        None where it is not bfloat16, or this machine does not multiply that.
        """
        outputs, inputs = weight.shape
        if self._pack is None or weight.dtype != torch.bfloat16 or inputs % 2:
            return None
        weight = weight.contiguous()
        shape = -(-outputs // PANEL), inputs // 2, PANEL, 2
        panels = self._weights.empty(*shape, dtype=weight.dtype)
        self._pack.for_work(weight.numel())(
            weight.data_ptr(), panels.data_ptr(), outputs, inputs, torch.get_num_threads()
        )
        return panels

    def multiply(
        self,
        x: Tensor,
        panels: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        highest: Tensor | None = None,
    ) -> None:
        """``x Wᵀ + b``, added up in float32, to ``out`` (contiguous [rows, outputs], float32 or
        bfloat16).

        ``x``: bfloat16 [rows, inputs]; ``bias``: float32 [outputs]. ``highest``, if it is given,
        is written too, as ``Logits`` has it. A row's result does not depend on the others.
        """
        assert self._multiply is not None
        x = x.contiguous()
        (rows, inputs), outputs = x.shape, out.shape[1]
        assert x.dtype == panels.dtype == torch.bfloat16
        assert out.is_contiguous()
        assert out.shape[0] == rows
        assert bias is None or (bias.dtype == torch.float32 and bias.shape == (outputs,))
        assert panels.shape == (-(-outputs // PANEL), inputs // 2, PANEL, 2)
        if highest is not None:
            assert out.dtype == highest.dtype == torch.float32
            assert highest.is_contiguous()
            assert highest.shape == (rows, len(panels))
        # The weights are read once for each dozen rows.
        self._multiply[out.dtype].for_work(panels.numel() * (rows // _ROWS + 1))(
            *(x.data_ptr(), panels.data_ptr(), bias.data_ptr() if bias is not None else None),
            *(out.data_ptr(), highest.data_ptr() if highest is not None else None),
            *(rows, outputs, inputs, torch.get_num_threads()),
        )

    def add_rms_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """``x += delta`` in place, and the root mean square norm of the sum, in ``dtype``.

        ``x``, ``weight``: float32 [rows, features] and [features]; ``delta``: the shape of
        ``x``, in ``dtype`` or float32.
        """
        rows, features = x.shape
        assert x.is_contiguous()
        assert x.dtype == weight.dtype == torch.float32
        out = torch.empty(rows, features, dtype=dtype)
        function, pointer = self._norm[dtype], None
        if delta is not None:
            assert delta.shape == x.shape
            delta = delta.contiguous()
            pointer = delta.data_ptr()
            if delta.dtype != dtype:
                assert delta.dtype == torch.float32
                function = self._norm_of_float32
        function.for_work(rows * features)(
            *(x.data_ptr(), pointer, weight.data_ptr(), eps, out.data_ptr()),
            *(rows, features, torch.get_num_threads()),
        )
        return out

    def norm_heads_(self, heads: Tensor, weight: Tensor, eps: float) -> None:
        """The root mean square norm of each of ``heads`` ([tokens, heads, head_dim], a token's
        side by side) by itself, in place; ``weight``: float32 [heads, head_dim]."""
        rows, num_heads, dim = heads.shape
        assert heads[0].is_contiguous()
        assert weight.shape == (num_heads, dim)
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        self._norm_heads[heads.dtype].for_work(heads.numel())(
            *(heads.data_ptr(), heads.stride(0), weight.data_ptr(), eps),
            *(rows, num_heads, dim, torch.get_num_threads()),
        )

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) · up`` of a contiguous [tokens, 2 × features], gate first."""
        rows, features = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.is_contiguous()
        out = torch.empty(rows, features, dtype=gate_up.dtype)
        self._swiglu[gate_up.dtype].for_work(rows * features)(
            gate_up.data_ptr(), out.data_ptr(), rows, features, torch.get_num_threads()
        )
        return out

    def rotate_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotates ``heads`` ([tokens, heads, dim], any strides but the last) in place, by
        float32 [tokens, dim / 2]."""
        rows, num_heads, dim = heads.shape
        assert heads.stride(2) == 1
        assert cos.shape == sin.shape == (rows, dim // 2)
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        assert cos.dtype == torch.float32
        self._rotate[heads.dtype].for_work(heads.numel())(
            *(heads.data_ptr(), heads.stride(0), heads.stride(1), cos.data_ptr(), sin.data_ptr()),
            *(rows, num_heads, dim // 2, torch.get_num_threads()),
        )

    def write_kv(self, pool: Pool, layer: int, key_value: Tensor, slots: Tensor) -> None:
        """Writes each token's ``key_value`` ([tokens, parts, own heads, head_dim], a token's
        own elements side by side) to its slot (int64 [tokens])."""
        assert key_value[0].is_contiguous()
        assert slots.dtype == torch.int64
        self._write_kv[key_value.dtype].for_work(key_value.numel())(
            byref(pool), layer, key_value.data_ptr(), key_value.stride(0), slots.data_ptr(),
            len(slots),
        )  # fmt: skip

    def attend_decodes(
        self,
        pool: Pool,
        layer: int,
        query: Tensor,
        out: Tensor,
        *,
        block_table: Tensor,
        contexts: Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """Attention of the first ``len(contexts)`` tokens, each of a context of its own.

        ``query``: [tokens, heads, head_dim], a token's heads side by side; ``out``, written:
        contiguous [tokens, heads, value_dim]. ``block_table``, ``contexts``: int32
        [spans, most blocks] and [spans]. A context's result does not depend on the others.
        """
        spans, width = block_table.shape
        assert query[0].is_contiguous()
        assert out.is_contiguous()
        assert block_table.is_contiguous()
        assert block_table.dtype == contexts.dtype == torch.int32
        assert len(contexts) == spans
        read = spans * width * pool.block_size * pool.num_heads * pool.head_dim
        self._attend[query.dtype].for_work(read * pool.num_parts)(
            *(byref(pool), layer, query.data_ptr(), query.stride(0), out.data_ptr()),
            *(block_table.data_ptr(), width, contexts.data_ptr(), spans),
            *(query.shape[1] // pool.num_heads, scale, window or 0, torch.get_num_threads()),
        )

    def attends_chunks(self, layout: KvLayout) -> bool:
        """Whether ``attend_chunk`` takes a pool of this layout."""
        return self._multiply is not None and layout.dtype == "bfloat16" and not layout.head_dim % 2

    def attend_chunk(
        self,
        pool: Pool,
        layer: int,
        query: Tensor,
        out: Tensor,
        *,
        block_table: Tensor,
        num_before: int,
        scale: float,
        window: int | None,
    ) -> None:
        """Causal attention of consecutive tokens of one sequence, which ``num_before`` precede
        and whose own KV is written.

        ``query``, ``out``: bfloat16 [tokens, heads, head_dim] and, written, [tokens, heads,
        value_dim], a token's heads side by side; ``block_table``: int32 [blocks]. A token's
        result does not depend on where its prompt was cut.
        """
        num_tokens = len(query)
        context = num_before + num_tokens
        assert query[0].is_contiguous()
        assert out[0].is_contiguous()
        assert query.dtype == out.dtype == torch.bfloat16
        assert block_table.dtype == torch.int32
        assert block_table.is_contiguous()
        assert len(block_table) * pool.block_size >= context
        self._attend_chunk.for_work(num_tokens * context * query.shape[1])(
            *(byref(pool), layer, query.data_ptr(), query.stride(0)),
            *(out.data_ptr(), out.stride(0), block_table.data_ptr(), num_before, num_tokens),
            *(query.shape[1] // pool.num_heads, scale, window or 0, torch.get_num_threads()),
        )


_kernels: Kernels | None = None


def kernels() -> Kernels | None:
    """This process's, if it has them."""
    return _kernels


def use_kernels(choice: Choice) -> Chosen:
    """From now on this process computes with them, or with torch; returns which.

    ``auto`` takes torch where they cannot be had, and logs why. Raises ConfigurationError
    where ``native`` cannot be had.
    """
    global _kernels
    if choice == "torch":
        _kernels = None
        return "torch"
    try:
        _kernels = Kernels(find_library())
    except ConfigurationError as error:
        if choice == "native":
            raise
        logger.warning("decoding is slower than it could be: %s", error.message)
        _kernels = None
        return "torch"
    return "native"
