"""GGUF files with damaged bytes: a sentence that names the file, and the field if there is one."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.tiny_models import CHAT_TEMPLATE, vocabulary, write_tiny_gguf

from baton.checkpoint.checkpoint import open_checkpoint
from baton.errors import CheckpointError

NUM_RANDOM = 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("whole") / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def value_offset(path: Path, key: str) -> int:
    """Where the value of ``key`` begins; its type is in the four bytes before that."""
    field = gguf.GGUFReader(path).fields[key]
    return int(field.offset) + 8 + len(key) + 4


def overwritten(whole: Path, path: Path, offset: int, data: bytes) -> str:
    content = bytearray(whole.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return str(path)


def test_text_that_is_no_utf8_is_named_with_its_field(tmp_path: Path, whole: Path) -> None:
    for key, text in (
        ("tokenizer.ggml.tokens", vocabulary()[1]),
        ("tokenizer.chat_template", CHAT_TEMPLATE),
    ):
        start = value_offset(whole, key)
        offset = whole.read_bytes().index(text.encode(), start)
        path = overwritten(whole, tmp_path / "tiny.gguf", offset + 2, b"\xff")
        with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*damaged \({key}: .*utf-8"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "at", "data", "named"),
    [
        # An array of int32 that claims to go on past the end of the file.
        ("tokenizer.ggml.token_type", 4, struct.pack("<Q", 2**62), "items; expected at most"),
        # Arrays in each other, which the format allows and nothing uses.
        ("tokenizer.ggml.token_type", 0, struct.pack("<I", 9), "one of arrays"),
        ("tokenizer.ggml.token_type", 0, struct.pack("<I", 6), r"token_type has .*expected int"),
        ("tokenizer.ggml.tokens", -4, struct.pack("<I", 8), "truncated or damaged"),
        ("llama.attention.head_count", 0, bytes(4), "head_count is 0; expected 1 or more"),
        ("llama.block_count", 0, b"\xff" * 4, "num_hidden_layers is 4294967295; expected 10000"),
        ("llama.attention.key_length", 0, b"\x07\0\0\0", "expected the head's 7"),
        ("llama.embedding_length", 0, bytes(4), "hidden_size is 0"),
        ("llama.rope.freq_base", 0, b"\0\0\xc0\x7f", "rope_theta is nan"),
    ],
)
def test_impossible_metadata_is_named(
    tmp_path: Path, cache: Path, whole: Path, key: str, at: int, data: bytes, named: str
) -> None:
    offset = value_offset(whole, key) + at
    path = overwritten(whole, tmp_path / "tiny.gguf", offset, data)
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*{named}"):
        open_checkpoint(path)
    assert not list(cache.rglob("config.json"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tokenizer.ggml.merges": [1, 2]}, r"merges has 1 in it; expected str alone"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokens has 1 in it; expected str alone"),
        ({"llama.rope.freq_base": 3e38}, "rope_theta is 3e\\+38"),
    ],
)
def test_values_of_another_kind_are_named(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*{named}"):
        open_checkpoint(str(path))


def damages(num_header_bytes: int) -> Iterator[tuple[int, bytes]]:
    draw = random.Random(0)
    for _ in range(NUM_RANDOM):
        data = draw.choice([bytes, draw.randbytes, lambda n: b"\xff" * n])(draw.randint(1, 8))
        yield draw.randrange(4, num_header_bytes - len(data)), data


def test_a_damaged_header_is_read_or_refused_by_the_files_name(tmp_path: Path, whole: Path) -> None:
    path, num_refused = tmp_path / "tiny.gguf", 0
    for offset, data in damages(gguf.GGUFReader(whole).data_offset):
        overwritten(whole, path, offset, data)
        try:
            open_checkpoint(str(path))
        except CheckpointError as error:
            assert str(path) in str(error), (offset, data)  # noqa: PT017
            num_refused += 1
    assert 0 < num_refused < NUM_RANDOM
