"""The default model's weights, dequantized and judged by ``transformers``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.config import DEFAULT_MODEL
from engine.weights.load import hf_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_checkpoint(DEFAULT_MODEL)


@pytest.mark.slow
def test_the_model_knows_the_capital_of_france(checkpoint: Checkpoint) -> None:
    folder = hf_folder(checkpoint, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        assert torch.isfinite(model(**prompt).logits).all()
        output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert model.dtype == torch.bfloat16
    answer = output[0, prompt["input_ids"].shape[1] :].tolist()
    assert answer[-1] in checkpoint.eos_token_ids
    assert tokenizer.decode(answer[:-1]) == "The capital of France is Paris."
