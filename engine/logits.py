"""What a model says of each possible next token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Logits:
    """Of some rows of a step. The model's next step overwrites them."""

    values: Tensor
    """Float32 [rows, vocabulary], on the model's device."""

    highest: Tensor | None = None
    """Float32 [rows, blocks], the highest of each 32 columns and NaN where one of these is; None
    where the product did not tell. Read instead of the logits it saves a draw of 32 rows of 49,152
    the 6 MB that other weights have pushed out of the processor's caches meanwhile."""
