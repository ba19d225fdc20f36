"""The revision: equal for equal content anywhere, different for different weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from baton.checkpoint.revision import content_revision
from baton.errors import CheckpointError

MIB = 1024 * 1024


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(4 * MIB)


def test_equal_content_has_one_revision_wherever_it_lies(tmp_path: Path, content: bytes) -> None:
    here = write(tmp_path / "here" / "model.safetensors", content)
    there = write(tmp_path / "there" / "model.safetensors", content)
    assert content_revision(b"{}", [here]) == content_revision(b"{}", [there])


@pytest.mark.parametrize("num_bytes", [0, 5, MIB - 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 1, 4 * MIB])
def test_first_and_last_byte_and_size_count(tmp_path: Path, content: bytes, num_bytes: int) -> None:
    content = content[:num_bytes]
    variants = {content, content + b"\0"}
    if num_bytes:
        variants |= {bytes([content[0] ^ 1]) + content[1:], content[:-1] + b"\xff"}
    revisions = {content_revision(b"{}", [write(tmp_path / "x", v)]) for v in variants}
    assert len(revisions) == len(variants)


@pytest.mark.parametrize("offset", [MIB // 2, -MIB // 2])
def test_every_byte_of_the_first_and_last_mib_counts(
    tmp_path: Path, content: bytes, offset: int
) -> None:
    changed = bytearray(content)
    changed[offset] ^= 1
    one, other = write(tmp_path / "a", content), write(tmp_path / "b", bytes(changed))
    assert content_revision(b"{}", [one]) != content_revision(b"{}", [other])


def test_a_tensor_retrained_in_the_middle_counts(tmp_path: Path, content: bytes) -> None:
    changed = bytearray(content)
    changed[2 * MIB : 2 * MIB + 65536] = random.Random(1).randbytes(65536)
    one, other = write(tmp_path / "a", content), write(tmp_path / "b", bytes(changed))
    assert content_revision(b"{}", [one]) != content_revision(b"{}", [other])


def test_metadata_and_the_division_into_files_count(tmp_path: Path) -> None:
    ab, c = write(tmp_path / "ab", b"ab"), write(tmp_path / "c", b"c")
    a, bc = write(tmp_path / "a", b"a"), write(tmp_path / "bc", b"bc")
    revisions = {
        content_revision(b"{}", [ab, c]),
        content_revision(b"{}", [a, bc]),
        content_revision(b"{ }", [ab, c]),
        content_revision(b"{}", [c, ab]),
    }
    assert len(revisions) == 4


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.gguf"):
        content_revision(b"", [tmp_path / "gone.gguf"])
