"""The layers of a decoder that hold weights or constants; activations are [tokens, features]."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.native.kernels import kernels
from engine.native.layers import Panels

Layer = Callable[[Tensor], Tensor]
"""[tokens, in] → [tokens, out]."""


class Linear:
    """``x Wᵀ + b`` for weights [out, in], which are laid out anew once and not kept as given.

    In bfloat16 the CPU kernels multiply, where the process has them and the processor can: they
    add up in float32, and no row's result depends on the others. Otherwise oneDNN does, where
    it can: at one row bfloat16 then takes 0.7 times as long as ``F.linear``, float32 0.4 times.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._native = kernels()
        self._is_packed = False
        panels = self._native.panels(weight) if self._native is not None else None
        self.panels: Panels | None = None
        if panels is not None:
            self.panels = Panels(panels, None if bias is None else bias.float(), len(weight))
        elif _can_pack(weight):
            self._is_packed = True
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        else:
            # Without what other ranks have of the same matrix.
            is_part = weight.nbytes < weight.untyped_storage().nbytes()
            self._weight = weight.clone() if weight.is_cuda and is_part else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out]."""
        if self.panels is not None:
            out = torch.empty(len(x), self.panels.num_outputs, dtype=x.dtype)
            return self._multiply(x, out, self.panels)
        if not self._is_packed:
            return F.linear(x, self._weight, self._bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product

    def in_float32(
        self, x: Tensor, out: Tensor | None = None, highest: Tensor | None = None
    ) -> Tensor:
        """Like a call, in float32 whatever the weights are; where they are not, in ``out``, if
        it is given. ``highest`` is for ``panels`` alone, and as ``Logits`` has it.

        Where oneDNN has packed them, what a first product lost by rounding is the result of a
        second one: oneDNN adds before it rounds. At one row that is cheaper than float32
        weights (1.9 against 2.6 ms for a vocabulary of 49,152), and needs no copy.
        """
        if self.panels is not None:
            if out is None:
                out = torch.empty(len(x), self.panels.num_outputs)
            return self._multiply(x, out, self.panels, highest)
        assert highest is None
        if x.is_cuda and x.dtype != torch.float32:
            product = torch.mm(x, self._weight.t(), out_dtype=torch.float32)
            return product if self._bias is None else product.add_(self._bias)
        product = self(x)
        if product.dtype == torch.float32:
            return product
        result = product.float() if out is None else out.copy_(product)
        if not self._is_packed:
            return result
        lost: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, product, self._weight, self._bias, "sub"
        )
        return result.add_(lost)

    def _multiply(
        self, x: Tensor, out: Tensor, panels: Panels, highest: Tensor | None = None
    ) -> Tensor:
        assert self._native is not None
        self._native.multiply(x, panels.weight, out, panels.bias, highest)
        return out


def _fused() -> ModuleType:
    """What a GPU computes between products; it needs triton, which a CPU does without."""
    from engine.gpu import fused

    return fused


def _can_pack(weight: Tensor) -> bool:
    """Whether torch has the operators that its own compiler uses on CPUs."""
    is_available: Callable[[], bool] = torch.backends.mkldnn.is_available
    if weight.device.type != "cpu" or not is_available():
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_linear_pointwise") or not hasattr(ops, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class RMSNorm:
    """Root mean square normalization (Zhang and Sennrich, 2019) over the features,
    from the float32 residual stream to the dtype of ``weight``."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._dtype = weight.dtype
        self.weight = weight.float()
        """Float32, contiguous."""
        self._eps = eps

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Of ``x``, float32 [..., features]; ``delta`` is first added to it, in place."""
        native = kernels()
        if native is not None and self.weight.dim() == 1 and x.dim() == 2:
            x = x.contiguous() if delta is None else x
            return native.add_rms_norm(x, delta, self.weight, self._eps, self._dtype)
        if x.is_cuda and self.weight.dim() == 1 and x.dim() == 2:
            normed: Tensor = _fused().add_rms_norm(x, delta, self.weight, self._eps, self._dtype)
            return normed
        if delta is not None:
            x += delta
        # At 512 tokens half as long as F.rms_norm.
        inverse = x.square().mean(dim=-1, keepdim=True).add_(self._eps).rsqrt_()
        return (x * inverse).mul_(self.weight).to(self._dtype)


class HeadNorm:
    """``RMSNorm`` of each head by itself; ``weight`` is [heads, head_dim]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._norm = RMSNorm(weight, eps)
        self._eps = eps

    @property
    def weight(self) -> Tensor:
        """Float32."""
        return self._norm.weight

    def normalize_(self, heads: Tensor) -> None:
        """Of ``heads`` ([tokens, heads, head_dim], a token's side by side), in place."""
        native = kernels()
        if native is not None:
            native.norm_heads_(heads, self.weight, self._eps)
        else:
            heads.copy_(self._norm(heads.float()))


class Rotary:
    """Rotary position embedding (Su et al., 2021), in the half-split form of Llama.

    ``frequencies`` ([head_dim / 2]) are radians a position; ``scale`` multiplies
    cosines and sines.
    """

    def __init__(self, frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        self._frequencies = frequencies
        self._dtype = dtype
        self._scale = scale

    def angles(self, positions: Tensor) -> Angles:
        """Of one step's ``positions``, [tokens]."""
        angles = positions[:, None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return Angles(cos, sin, self._dtype)


class Angles:
    """Cosines and sines of one step's positions, float32 [tokens, head_dim / 2]."""

    def __init__(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> None:
        self.cos, self.sin = cos, sin
        self._native = kernels()
        if self._native is None and not cos.is_cuda:
            # [tokens, 1, 2, head_dim / 2]: over heads, and the half of the head.
            self._both_cos = torch.stack([cos, cos], dim=1)[:, None].to(dtype)
            self._signed_sin = torch.stack([-sin, sin], dim=1)[:, None].to(dtype)

    def rotate_(self, heads: Tensor) -> None:
        """Rotates ``heads`` ([tokens, heads, head_dim]) in place."""
        if self._native is not None:
            self._native.rotate_(heads, self.cos, self.sin)
            return
        if heads.is_cuda:
            _fused().rotate_(heads, self.cos, self.sin)
            return
        halves = heads.view(*heads.shape[:2], 2, -1)
        swapped = halves.flip(2)
        halves.mul_(self._both_cos).addcmul_(swapped, self._signed_sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU (Shazeer, 2020): ``silu(gate) · up`` of [tokens, 2 × features], gate first."""
    native = kernels()
    if native is not None and gate_up.is_contiguous():
        return native.swiglu(gate_up)
    if gate_up.is_cuda:
        product: Tensor = _fused().swiglu(gate_up)
        return product
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
