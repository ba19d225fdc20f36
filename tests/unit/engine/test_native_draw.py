"""The kernel draws what torch draws, on every kind of processor, in any batch, on any threads."""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cpu_kernels import computing_with
from torch import Tensor

from baton.errors import InternalError
from engine.logits import Logits
from engine.native import build
from engine.native.draw import draw_tokens
from engine.native.kernels import Choice, Kernels
from engine.sampling import draw as draw_module
from engine.sampling.draw import draw
from engine.sampling.params import SamplingParams

GREEDY = SamplingParams(0, temperature=0.0)
CLOSE = 2e-6
"""Shares of a row that may go to another token by rounding."""
SIZES = [1, 2, 15, 16, 17, 33, 255, 256, 257, 700, 5000, 20_011]


class DrawAlone(Kernels):
    """A library of draw.h and nothing else."""

    def __init__(self, path: Path) -> None:
        self._libraries = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))


def _variants() -> list[tuple[str, ...]]:
    """The compiler's options for what this processor can run; bfloat16 changes nothing here."""
    if not build._is_x86_64():
        return [()]
    best = build._target_options()
    options = [options for _, options in build._X86_64]
    less = options[options.index(best) + 1 :]
    return [best, *(each for each in less if each != build._WIDE)]


@pytest.fixture(scope="module", params=_variants(), ids=lambda options: " ".join(options) or "any")
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    compiler, *words = build._compiler_words()
    if shutil.which(compiler) is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("draw")
    header = build._SOURCE.with_name("draw.h")
    options = (*build._OPTIONS, *request.param, "-include", str(header))
    for command in (
        [*options, "-c", "-x", "c++", "/dev/null", "-o", str(folder / "draw.o")],
        ["-shared", str(folder / "draw.o"), "-o", str(folder / "draw.so")],
    ):
        subprocess.run([compiler, *words, *command], check=True, timeout=120)
    build._share_openmp()
    return DrawAlone(folder / "draw.so")


def by_torch(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    with computing_with("torch"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_module, "uniform", lambda _, position: uniforms[position])
        return draw(Logits(logits), params, list(range(len(params))))


def some_logits(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Peaked, flat, with ties, with banned tokens: a kind for each row."""
    logits = torch.randn(rows, size, generator=generator)
    for row in range(rows):
        kind = row % 8
        if kind < 3:
            logits[row] *= (0.1, 3.0, 12.0)[kind]
        elif kind == 3:
            logits[row] = 2.5
        elif kind == 4:
            logits[row] = (logits[row] * 2).round() / 2
        elif kind == 5:
            logits[row] = logits[row].round() * 1e-3 + 700.0
        elif kind == 6:
            banned = torch.rand(size, generator=generator) < 0.9
            banned[size // 2] = False
            logits[row][banned] = -torch.inf
        else:
            ranks = torch.randperm(size, generator=generator) + 1.0
            logits[row] = -1.7 * ranks.log() - 20.0
    return logits


def some_params(rows: int, size: int, numbers: random.Random) -> list[SamplingParams]:
    return [
        SamplingParams(
            seed=row,
            temperature=numbers.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.0, 1.7, 1e-30, 100.0]),
            top_k=numbers.choice([0, 0, 0, 1, 5, 50, 300, size]),
            top_p=numbers.choice([1.0, 1.0, 0.9, 0.9, 0.5, 0.99, 0.999999, 1e-9]),
            min_p=numbers.choice([0.0, 0.0, 0.0, 0.02, 0.4, 1.0]),
        )
        for row in range(rows)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_that_torch_draws_but_where_rounding_decides(
    native: Kernels, size: int
) -> None:
    generator, numbers = torch.Generator().manual_seed(size), random.Random(size)
    rows = 64 if size > 1000 else 400
    logits, params = some_logits(rows, size, generator), some_params(rows, size, numbers)
    uniforms = [numbers.random() for _ in range(rows)]
    found = draw_tokens(native, Logits(logits), params, uniforms)
    expected = by_torch(logits, params, uniforms)
    others = [row for row in range(rows) if found[row] != expected[row]]
    assert len(others) <= rows // 50
    for row in others:
        around = [max(0.0, uniforms[row] - CLOSE), min(uniforms[row] + CLOSE, 1 - 2.0**-53)]
        near = by_torch(logits[[row, row]], [params[row]] * 2, around)
        assert found[row] in near, params[row]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0),
        SamplingParams(0, top_k=40),
        SamplingParams(0, top_k=1000),
        SamplingParams(0, top_p=0.9),
        SamplingParams(0, top_k=1000, top_p=0.6),
        SamplingParams(0, temperature=0.5, min_p=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", range(8))
def test_a_row_s_uniform_numbers_lead_to_its_tokens_in_their_shares(
    native: Kernels, params: SamplingParams, kind: int
) -> None:
    """A grid of numbers inverts to the same tokens: shares are equal to within its steps."""
    row = some_logits(8, 3000, torch.Generator().manual_seed(3))[kind]
    grid = [(i + 0.37) / 500 for i in range(500)]
    found = draw_tokens(native, Logits(row.expand(500, -1)), [params] * 500, grid)
    assert found == sorted(found)
    expected = by_torch(row.expand(500, -1), [params] * 500, grid)
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_s_token_depends_neither_on_others_nor_on_threads(
    native: Kernels, threads: int
) -> None:
    numbers = random.Random(1)
    logits = some_logits(48, 100_001, torch.Generator().manual_seed(1))  # worth threads
    params, uniforms = some_params(48, 100_001, numbers), [numbers.random() for _ in range(48)]
    alone = [
        draw_tokens(native, Logits(logits[row : row + 1]), [params[row]], [uniforms[row]])[0]
        for row in range(48)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert draw_tokens(native, Logits(logits), params, uniforms) == alone
    finally:
        torch.set_num_threads(before)
    backwards = draw_tokens(native, Logits(logits.flip(0)), params[::-1], uniforms[::-1])
    assert backwards[::-1] == alone


def test_rows_may_lie_apart_and_logits_stay_as_they_are(native: Kernels) -> None:
    numbers = random.Random(2)
    memory = some_logits(16, 900, torch.Generator().manual_seed(2))
    before = memory.clone()
    params, uniforms = some_params(16, 300, numbers), [numbers.random() for _ in range(16)]
    for logits in (memory[:, 7:307], memory[:, ::3]):
        expected = draw_tokens(native, Logits(logits.contiguous()), params, uniforms)
        assert draw_tokens(native, Logits(logits), params, uniforms) == expected
    assert torch.equal(memory, before)


def told(logits: Tensor) -> Logits:
    """With the highest of each 32 columns, as a product tells them."""
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 32), value=-math.inf)
    return Logits(logits, padded.view(len(logits), -1, 32).amax(dim=-1))


@pytest.mark.parametrize("size", SIZES)
def test_highest_logits_that_are_told_lead_to_the_same_tokens(native: Kernels, size: int) -> None:
    numbers = random.Random(size)
    logits = some_logits(64, size, torch.Generator().manual_seed(size))
    params, uniforms = some_params(64, size, numbers), [numbers.random() for _ in range(64)]
    expected = draw_tokens(native, Logits(logits), params, uniforms)
    assert draw_tokens(native, told(logits), params, uniforms) == expected


def test_highest_logits_that_are_told_are_what_a_greedy_token_is_looked_up_by(
    native: Kernels,
) -> None:
    logits = told(torch.arange(700.0)[None])
    assert logits.highest is not None
    logits.highest[0, 18:] = -math.inf  # from column 576 on, so that 575 is the highest
    assert draw_tokens(native, logits, [GREEDY], [0.0]) == [575]


@pytest.mark.parametrize("place", [0, 31, 32, 299])
def test_a_nan_is_told_with_the_highest_logits(native: Kernels, place: int) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(place))
    logits[1, place] = math.nan
    assert draw_tokens(native, told(logits), [GREEDY] * 2, [0.0] * 2)[1] == place
    with pytest.raises(InternalError, match="not numbers"):
        draw_tokens(native, told(logits), [SamplingParams(0)] * 2, [0.5] * 2)


@pytest.mark.parametrize("size", SIZES)
def test_greedy_is_the_first_of_the_highest_wherever_it_is(native: Kernels, size: int) -> None:
    places = sorted({0, size // 3, size // 2, size - 1})
    logits = torch.randn(len(places), size, generator=torch.Generator().manual_seed(0))
    for row, place in enumerate(places):
        logits[row, place:] = logits[row, place:].clamp(max=9.0)
        logits[row, [place, size - 1]] = 9.0
    assert (
        draw_tokens(native, Logits(logits), [GREEDY] * len(places), [0.0] * len(places)) == places
    )
    banned = torch.full((1, size), -math.inf)
    assert draw_tokens(native, Logits(banned), [GREEDY], [0.0]) == [0]


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_ends_of_the_unit_interval_lead_to_possible_tokens(native: Kernels, number: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.full((200, 2000), -math.inf)
    logits[:, 300:1500] = torch.rand(200, 1200, generator=generator) * 30
    logits[:, 512:768] = -math.inf
    for params in (SamplingParams(0), SamplingParams(0, top_k=900), SamplingParams(0, top_p=0.999)):
        for row, token in enumerate(
            draw_tokens(native, Logits(logits), [params] * 200, [number] * 200)
        ):
            assert logits[row, token] > -math.inf


@pytest.mark.parametrize("choice", ["native", "torch"])
@pytest.mark.parametrize(
    "row", [[1.0, math.nan, 2.0], [-math.inf] * 3, [math.inf, 1.0, 2.0], [math.nan] * 20]
)
@pytest.mark.parametrize("params", [SamplingParams(0), SamplingParams(0, top_k=2, top_p=0.5)])
def test_logits_that_are_no_distribution_s_are_refused(
    choice: Choice, row: list[float], params: SamplingParams
) -> None:
    logits = torch.stack([torch.zeros(len(row)), torch.tensor(row)])
    with computing_with(choice):
        with pytest.raises(InternalError, match="not numbers"):
            draw(Logits(logits), [params] * 2, [0, 0])
        assert draw(Logits(logits), [params, GREEDY], [0, 0])[1] == logits[1].argmax()


def test_a_step_of_every_kind_of_row_goes_to_the_kernel_at_once() -> None:
    """As the sampler calls it: the same tokens as with torch, whose rows are drawn apart."""
    numbers = random.Random(4)
    logits = some_logits(64, 4000, torch.Generator().manual_seed(4))
    params = [replace(each, seed=7) for each in some_params(64, 4000, numbers)]
    found = {}
    for choice in ("native", "torch"):
        with computing_with(choice):
            found[choice] = draw(Logits(logits), params, list(range(64)))
    assert sum(a != b for a, b in zip(found["native"], found["torch"], strict=True)) <= 1
