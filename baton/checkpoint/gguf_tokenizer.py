"""``tokenizer.json`` from the vocabulary and merges in a GGUF file.

A GGUF names its pre-tokenizer only by a word. Each word needs its own pipeline,
compared with the original, so words that are not known here are refused: a split
that differs in one place would feed the model other tokens than it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from baton.checkpoint.gguf_fields import GgufFields
from baton.checkpoint.pre_tokenizers import PRE_TOKENIZERS

# Token types of the format.
_CONTROL = 3
_USER_DEFINED = 4


def build_tokenizer(fields: GgufFields) -> Tokenizer:
    """A BPE with the ids of the file; its control tokens are special.

    Raises:
        CheckpointError: another kind of tokenizer, or one that does not fit together.
    """
    _refuse_unsupported(fields)
    tokens = fields.items("tokenizer.ggml.tokens", str)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        fields.fail("tokenizer.ggml.tokens names a token twice")
    is_byte_level = fields.require("tokenizer.ggml.model", str) == "gpt2"
    tokenizer = (_byte_level if is_byte_level else _sentencepiece)(fields, vocabulary)
    _add_special_tokens(tokenizer, fields, tokens)
    _add_bos(tokenizer, fields, default=not is_byte_level)
    return tokenizer


def _byte_level(fields: GgufFields, vocabulary: Mapping[str, int]) -> Tokenizer:
    """The BPE of GPT-2 over bytes, behind the split that the file names."""
    pre = PRE_TOKENIZERS[fields.require("tokenizer.ggml.pre", str)]
    merges = []
    for merge in fields.items("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            fields.fail(f"tokenizer.ggml.merges: {merge!r} is not made of known tokens")
        merges.append((left, right))
    model = BPE(vocab=dict(vocabulary), merges=merges, ignore_merges=pre.ignores_merges)
    tokenizer = Tokenizer(model)
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(pre.steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: GgufFields, vocabulary: Mapping[str, int]) -> Tokenizer:
    """The BPE of Llama 2: its merges are those that make its pieces, the best score first."""
    scores = fields.items("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary):
        fields.fail(f"tokenizer.ggml.scores has {len(scores)} entries; expected {len(vocabulary)}")
    merges = []
    for (piece, index), score in zip(vocabulary.items(), scores, strict=True):
        for border in range(1, len(piece)):
            left, right = vocabulary.get(piece[:border]), vocabulary.get(piece[border:])
            if left is not None and right is not None:
                merges.append((-score, index, left, right, piece[:border], piece[border:]))
    model = BPE(
        vocab=dict(vocabulary),
        merges=[merge[-2:] for merge in sorted(merges)],
        unk_token=_token(fields, "tokenizer.ggml.unknown_token_id"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    has_prefix = fields.optional("tokenizer.ggml.add_space_prefix", bool) is not False
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps
    )
    return tokenizer


def tokenizer_config(fields: GgufFields) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.require(fields.own("context_length"), int),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _token(fields, f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{role}_token"] = token
    template = fields.optional("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    return config


def _refuse_unsupported(fields: GgufFields) -> None:
    model = fields.require("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        fields.fail(f"tokenizer.ggml.model {model!r} is not supported; supported: 'gpt2', 'llama'")
    pre = fields.optional("tokenizer.ggml.pre", str)
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        supported = ", ".join(repr(name) for name in PRE_TOKENIZERS)
        fields.fail(f"tokenizer.ggml.pre {pre!r} is not supported; supported are {supported}")
    if fields.optional("tokenizer.ggml.add_eos_token", bool):
        fields.fail("tokenizer.ggml.add_eos_token is not supported")


def _add_special_tokens(tokenizer: Tokenizer, fields: GgufFields, tokens: list[str]) -> None:
    """They are in the vocabulary already, so they keep their ids."""
    types = fields.items("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        fields.fail(f"tokenizer.ggml.token_type has {len(types)} entries; expected {len(tokens)}")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])


def _add_bos(tokenizer: Tokenizer, fields: GgufFields, *, default: bool) -> None:
    """Where the file asks for it, plain text is encoded with the first token before it."""
    asked = fields.optional("tokenizer.ggml.add_bos_token", bool)
    if not (default if asked is None else asked):
        return
    index = fields.require("tokenizer.ggml.bos_token_id", int)
    bos = _token(fields, "tokenizer.ggml.bos_token_id")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, index)]
    )


def _token(fields: GgufFields, key: str) -> str | None:
    index = fields.optional(key, int)
    if index is None:
        return None
    tokens = fields.items("tokenizer.ggml.tokens", str)
    if not 0 <= index < len(tokens):
        fields.fail(f"{key} {index} is no id of tokenizer.ggml.tokens")
    return str(tokens[index])
