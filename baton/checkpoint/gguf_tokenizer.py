"""``tokenizer.json`` from the vocabulary and merges in a GGUF file.

A GGUF names its pre-tokenizer only by a word. Each word needs its own pipeline,
compared with the original, so words that are not known here are refused: a split
that differs in one place would feed the model other tokens than it was trained on.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from baton.checkpoint.gguf_fields import GgufFields

SUPPORTED_PRE_TOKENIZERS = ("smollm",)

# Token types of the format.
_CONTROL = 3
_USER_DEFINED = 4


def build_tokenizer(fields: GgufFields) -> Tokenizer:
    """A byte-level BPE with the ids of the file; its control tokens are special.

    Raises:
        CheckpointError: another kind of tokenizer, or one that does not fit together.
    """
    _refuse_unsupported(fields)
    tokens = fields.require("tokenizer.ggml.tokens", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        fields.fail("tokenizer.ggml.tokens names a token twice")
    merges = []
    for merge in fields.require("tokenizer.ggml.merges", list):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            fields.fail(f"tokenizer.ggml.merges: {merge!r} is not made of known tokens")
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    # "smollm": every digit alone, then GPT-2's split into words, then bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, fields, tokens)
    _add_bos(tokenizer, fields, tokens)
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
    if model != "gpt2":
        fields.fail(f"tokenizer.ggml.model {model!r} is not supported; supported is 'gpt2'")
    pre = fields.optional("tokenizer.ggml.pre", str)
    if pre not in SUPPORTED_PRE_TOKENIZERS:
        supported = ", ".join(repr(name) for name in SUPPORTED_PRE_TOKENIZERS)
        fields.fail(f"tokenizer.ggml.pre {pre!r} is not supported; supported is {supported}")
    if fields.optional("tokenizer.ggml.add_eos_token", bool):
        fields.fail("tokenizer.ggml.add_eos_token is not supported")


def _add_special_tokens(tokenizer: Tokenizer, fields: GgufFields, tokens: list[str]) -> None:
    """They are in the vocabulary already, so they keep their ids."""
    types = fields.require("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        fields.fail(f"tokenizer.ggml.token_type has {len(types)} entries; expected {len(tokens)}")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])


def _add_bos(tokenizer: Tokenizer, fields: GgufFields, tokens: list[str]) -> None:
    """Where the file asks for it, plain text is encoded with the first token before it."""
    if not fields.optional("tokenizer.ggml.add_bos_token", bool):
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
    tokens = fields.require("tokenizer.ggml.tokens", list)
    if not 0 <= index < len(tokens):
        fields.fail(f"{key} {index} is no id of tokenizer.ggml.tokens")
    return str(tokens[index])
