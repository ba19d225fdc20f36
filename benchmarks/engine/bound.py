"""What this machine could do at best: a model's matrix products alone, and copying memory.

    python -m benchmarks.engine.bound --rows 1 8 32 --prompt 1030

prints JSON. The products are those of a dense decoder: of each layer one of query, key and value
together, one of the attention's output, one of gate and up together and one of down, and the
head's; random weights of the model's shapes, each matrix with memory of its own. They are packed
for oneDNN, as torch's compiler does it: that is the bound, and no work of ours. What the same
takes as the engine packs and multiplies them is told beside it. A decode step multiplies every
matrix by as many rows as there are streams. A prompt goes through in the engine's chunks, and the
head sees its last row alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from baton.checkpoint.checkpoint import open_checkpoint
from baton.checkpoint.model_config import ModelConfig
from baton.config import DEFAULT_MODEL, EngineConfig
from baton.errors import ConfigurationError
from benchmarks.engine.results import Bound
from engine.chunked_prefill import even_share
from engine.layers import Linear
from engine.native.kernels import use_kernels

CHUNK = 512
"""Tokens that go through at once, by default: the engine's."""
_COPIED_BYTES = 256 * 1024 * 1024
"""Beyond every cache."""


Inputs = dict[int, Tensor]


Product = Callable[[Tensor], object]


class Products:
    """A model's matrices, in bfloat16. ``packed`` makes the product with a weight
    ([outputs, inputs])."""

    def __init__(self, config: ModelConfig, packed: Callable[[Tensor], Product]) -> None:
        if config.parts.moe is not None or config.parts.latent is not None:
            raise ConfigurationError("the bound is that of dense models with plain attention")
        heads, kv_heads = config.num_heads, config.num_kv_heads
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = [
            ((heads + 2 * kv_heads) * config.head_dim, hidden),
            (hidden, heads * config.head_dim),
            (2 * inner, hidden),
            (hidden, inner),
        ]

        def make(outputs: int, inputs: int) -> tuple[Product, int]:
            return packed(torch.randn(outputs, inputs).bfloat16()), inputs

        self._layers = [make(*shape) for _ in range(config.num_layers) for shape in shapes]
        self._head = make(config.vocab_size, hidden)

    def step(self, inputs: Inputs, head_rows: int) -> None:
        """One step of as many rows as ``inputs`` have."""
        for multiply, width in self._layers:
            multiply(inputs[width])
        multiply, width = self._head
        multiply(inputs[width][:head_rows])

    def inputs(self, rows: int) -> Inputs:
        """Random ones, by their width."""
        widths = {width for _, width in (*self._layers, self._head)}
        return {width: torch.randn(rows, width).bfloat16() for width in widths}


def by_onednn(weight: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return product

    return multiply


def median_ms(work: Callable[[], object], *, repeats: int, warm_ups: int = 3) -> float:
    for _ in range(warm_ups):
        work()
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def _decode_ms(products: Products, rows: int) -> float:
    inputs = products.inputs(rows)
    return round(median_ms(partial(products.step, inputs, rows), repeats=30), 3)


def chunks_of(num_tokens: int, chunk: int) -> list[int]:
    """How the engine cuts a prompt that is alone, at most ``chunk`` tokens a step."""
    found: list[int] = []
    while num_tokens:
        found.append(even_share(num_tokens, chunk, EngineConfig().block_size))
        num_tokens -= found[-1]
    return found


def measure(
    model: str, *, rows: Sequence[int], num_prompt_tokens: int, chunk: int, threads: int
) -> Bound:
    torch.set_num_threads(threads)
    use_kernels("auto")
    config = open_checkpoint(model).config
    products, own = Products(config, by_onednn), Products(config, Linear)
    inputs = [products.inputs(length) for length in chunks_of(num_prompt_tokens, chunk)]

    def prompt(products: Products) -> None:
        for number, each in enumerate(inputs, 1):
            products.step(each, int(number == len(inputs)))

    def prompt_ms(products: Products) -> float:
        return round(median_ms(partial(prompt, products), repeats=5, warm_ups=1), 3)

    with torch.inference_mode():
        decode_ms, own_decode_ms = (
            {str(each): _decode_ms(by, each) for each in rows} for by in (products, own)
        )
        library_prompt_ms, own_prompt_ms = prompt_ms(products), prompt_ms(own)
        source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        copy_ms = median_ms(lambda: target.copy_(source), repeats=10)
    return Bound(
        threads=threads,
        decode_ms=decode_ms,
        prompt_tokens=num_prompt_tokens,
        prompt_ms=library_prompt_ms,
        copy_gb_s=round(2 * _COPIED_BYTES / copy_ms / 1e6, 2),
        own_decode_ms=own_decode_ms,
        own_prompt_ms=own_prompt_ms,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.bound", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=1030, help="tokens")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens at once")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    bound = measure(
        given.model,
        rows=given.rows,
        num_prompt_tokens=given.prompt,
        chunk=given.chunk,
        threads=given.threads,
    )
    print(json.dumps(asdict(bound)))


if __name__ == "__main__":
    main()
