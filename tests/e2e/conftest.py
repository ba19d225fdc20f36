"""Servers and the oracle, each made once for the tests that share it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import BatonServer

Serving = Callable[..., BatonServer]


@contextlib.contextmanager
def _serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Starts servers as asked; stops them, and shows that no process is left."""
    servers: list[BatonServer] = []

    def start(**options: Any) -> BatonServer:
        server = BatonServer(tmp_path_factory.mktemp("server"), **options)
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        children = server.descendants()
        status = server.stop()
        left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert status == 0, server.log
        assert not left, f"processes left behind: {left}\n{server.log}"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Servers that the tests of a module share."""
    with _serving(tmp_path_factory) as start:
        yield start


@pytest.fixture
def serving_one_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with _serving(tmp_path_factory) as start:
        yield start


class Oracle:
    """`transformers` with the same weights, in fp32."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from baton.checkpoint.checkpoint import open_checkpoint
        from baton.config import DEFAULT_MODEL
        from engine.weights.load import hf_folder

        self._torch = torch
        checkpoint = open_checkpoint(DEFAULT_MODEL)
        self.eos_token_ids = set(checkpoint.eos_token_ids)
        self._folder = hf_folder(checkpoint, torch.float32)
        self._load = AutoModelForCausalLM.from_pretrained
        self._model = self.copy_in(torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)

    def copy_in(self, dtype: Any) -> Any:
        """The same weights in another dtype."""
        return self._load(self._folder, dtype=dtype).eval()

    def logits(self, token_ids: list[int], model: Any = None) -> Any:
        """Teacher-forced, float32 [tokens, vocabulary]; in fp32 unless ``model`` is given."""
        with self._torch.inference_mode():
            output = (model or self._model)(self._torch.tensor([token_ids]))
        return output.logits[0].float()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_chat(self, question: str) -> list[int]:
        """One user turn through the checkpoint's chat template, as `transformers` has it."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return self.encode(text)

    def greedy_at(self, prompt: list[int], answer: list[int]) -> list[int]:
        """Its own choice at each place of ``answer``, after what stands before that place:
        ``answer`` itself if that is greedy. One pass, where ``greedy`` takes one a token.
        """
        with self._torch.inference_mode():
            output = self._model(
                self._torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1
            )
        choices: list[int] = output.logits[0, :-1].argmax(1).tolist()
        return choices

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What follows ``prompt``; ends after an end-of-sequence token."""
        with self._torch.inference_mode():
            output = self._model.generate(
                input_ids=self._torch.tensor([prompt]),
                attention_mask=self._torch.ones(1, len(prompt), dtype=self._torch.long),
                do_sample=False,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
        return [int(token) for token in output[0, len(prompt) :]]


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Oracle()
