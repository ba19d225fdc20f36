"""What only the CPU kernels have: contexts in parts, odd sizes, batches, and how they are got."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cpu_kernels import computing_with

from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from engine.native import build
from engine.native.kernels import Kernels, Pool, kernels, use_kernels

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
    assert first == again != build.build()


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
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    installed = build.install()
    assert all(path.is_file() for path in installed)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build() in installed
    assert not (tmp_path / "cache").exists()
