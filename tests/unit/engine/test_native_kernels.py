"""What only the CPU kernels have: contexts in parts, odd sizes, batches, and how they are got."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cpu_kernels import computing_with

from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from engine.layers import Linear, Rotary, swiglu
from engine.models.vocabulary import head_of
from engine.native import build
from engine.native.kernels import Kernels, Pool, kernels, use_kernels
from engine.parallel.group import RankGroups

V4 = "abm avx2 bmi1 bmi2 f16c fma movbe avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.fixture(scope="module")
def native() -> Iterator[Kernels]:
    with computing_with("native"):
        found = kernels()
        assert found is not None
        yield found


def decode(
    native: Kernels,
    contexts: list[int],
    *,
    head_dim: int,
    value_dim: int | None = None,
    group: int = 3,
    kv_heads: int = 2,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of random contexts, and the definition in float64."""
    torch.manual_seed(len(contexts) + head_dim)
    num_parts = 2 if value_dim is None else 1
    value_dim = value_dim or head_dim
    counts = [-(-context // block_size) for context in contexts]
    name = "float32" if dtype == torch.float32 else "bfloat16"
    layout = KvLayout(sum(counts), kv_heads, 2, block_size, head_dim, name, num_parts)
    kv = torch.randn(layout.shape).to(dtype)
    query = torch.randn(len(contexts), group * kv_heads, head_dim).to(dtype) * 2
    blocks = torch.randperm(layout.num_blocks, dtype=torch.int32)
    table = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count], blocks = blocks[:count], blocks[count:]
    out = torch.empty(len(contexts), group * kv_heads, value_dim, dtype=dtype)
    native.attend_decodes(
        Pool.of(layout, kv, value_dim=value_dim, own_heads=range(kv_heads)),
        1,
        query,
        out,
        block_table=table,
        contexts=torch.tensor(contexts, dtype=torch.int32),
        scale=head_dim**-0.5,
        window=window,
    )
    expected = torch.empty(out.shape, dtype=torch.float64)
    for row, context in enumerate(contexts):
        first = 0 if window is None else max(0, context - window)
        for head in range(group * kv_heads):
            own = kv[table[row, : counts[row]].long(), head // group, 1].double()
            keys, values = own[:, 0].flatten(0, 1), own[:, -1, :, :value_dim].flatten(0, 1)
            scores = keys[first:context] @ query[row, head].double() * head_dim**-0.5
            expected[row, head] = scores.softmax(0) @ values[first:context]
    return out, expected


@pytest.mark.parametrize("window", [None, 500, 700])
@pytest.mark.parametrize("contexts", [[511, 512, 513], [1], [3000, 5, 1024, 1025]])
def test_long_contexts_are_put_together_from_their_parts(
    native: Kernels, contexts: list[int], window: int | None
) -> None:
    out, expected = decode(native, contexts, head_dim=64, window=window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "group"),
    [(64, None, 1), (64, None, 9), (80, None, 4), (128, None, 5), (8, None, 2), (576, 512, 16),
     (40, 20, 3)],
)  # fmt: skip
def test_any_size_of_heads_and_blocks(
    native: Kernels,
    head_dim: int,
    value_dim: int | None,
    group: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    out, expected = decode(
        native,
        [70, 33, 1],
        head_dim=head_dim,
        value_dim=value_dim,
        group=group,
        block_size=block_size,
        dtype=dtype,
    )
    bound = 1e-6 if dtype == torch.float32 else 3e-3
    assert (out.double() - expected).norm() / expected.norm() < bound


def test_a_context_has_the_same_result_in_any_batch(native: Kernels) -> None:
    """Bit for bit: which sequences share a step must not change anybody's tokens."""
    layout = KvLayout(200, 2, 1, 16, 64, "float32")
    kv, query = torch.randn(layout.shape), torch.randn(5, 6, 64)
    contexts = torch.tensor([900, 3, 512, 700, 40], dtype=torch.int32)
    table = torch.randint(0, 200, (5, 57), dtype=torch.int32)
    pool = Pool.of(layout, kv, value_dim=64, own_heads=range(2))

    def attend(rows: slice) -> torch.Tensor:
        own = query[rows]
        out = torch.empty_like(own)
        native.attend_decodes(
            pool, 0, own, out, block_table=table[rows], contexts=contexts[rows], scale=0.1,
            window=None,
        )  # fmt: skip
        return out

    together = attend(slice(0, 5))
    for row in range(5):
        assert torch.equal(attend(slice(row, row + 1))[0], together[row])


def test_own_heads_are_read_and_written_and_no_others(native: Kernels) -> None:
    layout = KvLayout(4, 4, 2, 16, 8, "float32")
    kv = torch.zeros(layout.shape)
    pool = Pool.of(layout, kv, value_dim=8, own_heads=range(1, 3))
    key_value = torch.randn(3, 2, 2, 8)
    native.write_kv(pool, 1, key_value, torch.tensor([5, 16, 63]))
    expected = torch.zeros(layout.shape)
    for row, slot in enumerate((5, 16, 63)):
        expected[slot // 16, 1:3, 1, :, slot % 16] = key_value[row].transpose(0, 1)
    assert torch.equal(kv, expected)


def test_rounding_to_bfloat16_is_torchs(native: Kernels) -> None:
    """The norm of rows whose mean square is 1 is the rows themselves, rounded."""
    x = torch.randn(50, 1024).square()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    ones = torch.ones(1024)
    exact = native.add_rms_norm(x.clone(), None, ones, 0.0, torch.float32)
    rounded = native.add_rms_norm(x.clone(), None, ones, 0.0, torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())
    x[3, 7] = float("nan")
    assert native.add_rms_norm(x, None, ones, 0.0, torch.bfloat16)[3].isnan().all()


def prefill(
    native: Kernels,
    chunks: list[int],
    *,
    head_dim: int = 64,
    value_dim: int | None = None,
    group: int = 3,
    kv_heads: int = 2,
    block_size: int = 16,
    window: int | None = None,
    magnitude: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One random context in bfloat16, computed in those chunks, and the definition in float64."""
    context, num_heads = sum(chunks), group * kv_heads
    torch.manual_seed(context + head_dim)
    num_parts = 2 if value_dim is None else 1
    value_dim = value_dim or head_dim
    num_blocks = -(-context // block_size)
    layout = KvLayout(num_blocks + 3, kv_heads, 2, block_size, head_dim, "bfloat16", num_parts)
    kv = torch.randn(layout.shape).bfloat16()
    query = (torch.randn(context, num_heads, head_dim) * magnitude).bfloat16()
    table = torch.randperm(layout.num_blocks, dtype=torch.int32)[:num_blocks]
    own = kv[table.long(), :, 1].double().transpose(0, 1)  # [heads, blocks, parts, tokens, dim]
    keys = own[:, :, 0].flatten(1, 2)[:, :context]
    values = own[:, :, -1].flatten(1, 2)[:, :context, :value_dim]
    kv[table[-1], :, :, :, (context - 1) % block_size + 1 :] = float("nan")  # nobody's yet
    assert native.attends_chunks(layout)
    out = torch.empty(context, num_heads, value_dim).bfloat16()
    first = 0
    for length in chunks:
        native.attend_chunk(
            Pool.of(layout, kv, value_dim=value_dim, own_heads=range(kv_heads)),
            1,
            query[first : first + length],
            out[first : first + length],
            block_table=table,
            num_before=first,
            scale=head_dim**-0.5,
            window=window,
        )
        first += length
    scores = torch.einsum("qhgd,hkd->hgqk", query.double().unflatten(1, (-1, group)), keys)
    distance = torch.arange(context)[:, None] - torch.arange(context)
    seen = (distance >= 0) & (distance < (window or context))
    weights = (scores * head_dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return out, torch.einsum("hgqk,hkd->qhgd", weights, values).flatten(1, 2)


def has_bfloat16(native: Kernels) -> bool:
    return native.attends_chunks(KvLayout(1, 1, 1, 16, 64, "bfloat16"))


@pytest.mark.parametrize(
    ("chunks", "shape"),
    [
        ([2], {}),
        ([33, 1, 70], {}),
        ([512, 100], {"group": 1, "kv_heads": 3}),
        ([40, 25], {"head_dim": 6, "group": 5}),
        ([40, 25], {"head_dim": 34, "block_size": 1}),
        ([100, 3], {"head_dim": 72, "value_dim": 50, "group": 13, "kv_heads": 1}),
        ([90, 90], {"window": 1}),
        ([90, 90, 90], {"window": 70, "block_size": 5}),
        ([300], {"window": 299}),
        ([40, 25], {"magnitude": 1e10}),
    ],
)
def test_chunks_attend_as_defined(
    native: Kernels, chunks: list[int], shape: dict[str, Any]
) -> None:
    if not has_bfloat16(native):
        pytest.skip("this processor does not multiply bfloat16")
    out, expected = prefill(native, chunks, **shape)
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.02
    assert error.mean() < 4e-3


@pytest.mark.parametrize("window", [None, 70])
def test_a_token_has_the_same_result_wherever_its_prompt_was_cut(
    native: Kernels, window: int | None
) -> None:
    if not has_bfloat16(native):
        pytest.skip("this processor does not multiply bfloat16")
    whole, _ = prefill(native, [200], window=window)
    for chunks in ([100, 100], [33, 1, 166], [199, 1]):
        assert torch.equal(prefill(native, chunks, window=window)[0], whole)


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 31, 100])
@pytest.mark.parametrize("outputs", [1, 16, 31, 33, 500])
def test_products_are_added_up_and_written_in_float32(
    native: Kernels, rows: int, outputs: int
) -> None:
    torch.manual_seed(rows + outputs)
    weight = torch.randn(outputs, 70).bfloat16()
    x = torch.randn(rows, 70).bfloat16()
    panels = native.panels(weight)
    if panels is None:
        pytest.skip("this processor does not multiply bfloat16")
    out = torch.full((rows, outputs), 7.0)
    native.multiply(x, panels, out)
    expected = x.double() @ weight.double().T
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    for row in range(rows):
        alone = torch.empty(1, outputs)
        native.multiply(x[row : row + 1], panels, alone)
        assert torch.equal(alone[0], out[row]), "a row's result depends on the others"


@pytest.mark.parametrize("rows", [1, 12, 13, 31])
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 31, 32, 500])
def test_products_tell_the_highest_of_each_panel(native: Kernels, rows: int, outputs: int) -> None:
    torch.manual_seed(rows + outputs)
    weight, x = -torch.rand(outputs, 70).bfloat16(), torch.rand(rows, 70).bfloat16()
    weight[-1, 5] = 0.0
    x[-1, 5] = torch.inf  # which makes its last product NaN, and the others -inf
    panels = native.panels(weight)
    if panels is None:
        pytest.skip("this processor does not multiply bfloat16")
    out, highest = torch.empty(rows, outputs), torch.full((rows, len(panels)), 7.0)
    native.multiply(x, panels, out, highest=highest)
    padded = torch.nn.functional.pad(out, (0, -outputs % 32), value=-torch.inf)
    expected = padded.view(rows, -1, 32).amax(dim=-1)
    assert expected[-1, -1].isnan()
    assert torch.equal(highest.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


def test_the_head_tells_the_highest_logits_of_every_step(native: Kernels) -> None:
    """Of more rows than before, and of fewer."""
    if not has_bfloat16(native):
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    head = head_of(torch.randn(500, 70).bfloat16(), RankGroups())
    for rows in (2, 30, 1):
        logits = head(torch.randn(rows, 70).bfloat16())
        padded = torch.nn.functional.pad(logits.values, (0, -500 % 32), value=-torch.inf)
        assert logits.highest is not None
        assert torch.equal(logits.highest, padded.view(rows, -1, 32).amax(dim=-1))


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_rounds_its_float32_sums_once(
    native: Kernels, rows: int, has_bias: bool
) -> None:
    """With its bias, whose last panel is not whole."""
    if not has_bfloat16(native):
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(rows)
    weight, x = torch.randn(75, 70).bfloat16(), torch.randn(rows, 70).bfloat16()
    bias = torch.randn(75).bfloat16() if has_bias else None
    linear = Linear(weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = linear.in_float32(x)
    assert (exact - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(linear(x), exact.bfloat16())
    given = torch.empty(rows, 75)
    assert linear.in_float32(x, given) is given
    assert torch.equal(given, exact)


def test_weights_that_are_not_multiplied_exactly_are_refused(native: Kernels) -> None:
    assert native.panels(torch.ones(8, 6)) is None
    assert native.panels(torch.ones(8, 7).bfloat16()) is None


@pytest.mark.parametrize("name", ["swiglu", "rotation"])
def test_rounds_where_torch_does(native: Kernels, name: str) -> None:
    """Bit for bit but for a different last bit of e^x here and there."""
    torch.manual_seed(0)
    found = {}
    for choice in ("native", "torch"):
        torch.manual_seed(1)
        with computing_with(choice):
            if name == "swiglu":
                found[choice] = swiglu(torch.randn(40, 1000).bfloat16())
            else:
                found[choice] = torch.randn(40, 5, 64).bfloat16()
                rotary = Rotary(torch.rand(32), torch.bfloat16)
                rotary.angles(torch.arange(40) * 7).rotate_(found[choice])
    differs = found["native"] != found["torch"]
    assert differs.float().mean() < 0.002


def test_without_a_compiler_auto_goes_on_with_torch_and_native_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with computing_with("torch"), monkeypatch.context() as without:
        without.setenv("BATON_CACHE", str(tmp_path))
        without.setenv("CXX", "no-such-compiler")
        with caplog.at_level(logging.WARNING):
            use_kernels("auto")
        assert kernels() is None
        assert "install g++ or set CXX" in caplog.text
        with pytest.raises(ConfigurationError, match=r"install g\+\+ or set CXX"):
            use_kernels("native")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_cache_that_may_not_be_read_is_no_reason_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("BATON_CACHE", str(closed))
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigurationError, match="cannot be kept"):
            build.build()
    finally:
        os.seteuid(0)


def test_a_compiler_may_have_words_before_it_and_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_OPTIONS", (*build._OPTIONS, "-O0"))  # a fifth of the time
    monkeypatch.setenv("CXX", "env g++ -g0")
    assert build.build().is_file()


def test_what_does_not_compile_is_refused_with_the_compilers_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    broken = tmp_path / "kernels.cpp"
    broken.write_text("int nothing() { return missing; }")
    monkeypatch.setattr(build, "_SOURCE", broken)
    with pytest.raises(ConfigurationError, match="missing"):
        build.build()
    assert not list((tmp_path / "kernels").glob("*/*.so"))


def test_another_source_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    source = tmp_path / "kernels.cpp"
    monkeypatch.setattr(build, "_SOURCE", source)
    source.write_text('extern "C" int one() { return 1; }')
    first = build.build()
    again = build.build()
    source.write_text('extern "C" int two() { return 2; }')
    second = build.build()
    assert first == again != second
    (tmp_path / "more.h").write_text("#define MORE")
    assert build.build() not in (first, second)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("sse2", ()),
        ("abm avx2 bmi1 bmi2 f16c fma movbe", ("-march=x86-64-v3",)),
        (
            V4,
            ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        ),
        (
            f"avx512_bf16 {V4}",
            ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"),
        ),
        (f"avx512_bf16 {V4.replace('avx2', '')}", ()),
    ],
)
def test_the_machine_gets_what_it_can_run(flags: str, options: tuple[str, ...]) -> None:
    assert build.options_for(set(flags.split())) == options


def test_an_image_has_them_for_every_processor_and_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_INSTALLED", tmp_path / "built")
    monkeypatch.setattr(build, "_OPTIONS", (*build._OPTIONS, "-O0"))  # a fifth of the time
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    installed = build.install()
    assert all(path.is_file() for path in installed)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build() in installed
    assert not (tmp_path / "cache").exists()
