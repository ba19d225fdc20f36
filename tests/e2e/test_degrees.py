"""Whole workers of different degrees of tensor parallelism, each rank of both a process of its
own, hand made models' KV over: at fp32 the tokens are those of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Serving
from support.degrees import DEGREES, KINDS, NUM_TOKENS, PROMPTS, write_model
from support.tiny_architectures import oracle_logits
from support.transports import needs_nixl

from cluster.procfs import descendants

TRANSPORTS = ["shared_memory", "gloo", "nixl"]
USUAL = {("replicated", (2, 4), "shared_memory"), ("latent", (2, 1), "gloo")}
"""Run every time; ``make exhaustive`` runs them all."""

Case = tuple[str, tuple[int, int], str]
CASES: list[Case] = [
    (kind, degrees, transport) for kind in KINDS for degrees in DEGREES for transport in TRANSPORTS
]


def marks_of(case: Case) -> list[pytest.MarkDecorator]:
    marks = [] if case in USUAL else [pytest.mark.exhaustive]
    return [*marks, needs_nixl] if case[2] == "nixl" else marks


def loaded(folder: Path) -> Any:
    """By transformers."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        answer.append(int(oracle_logits(model, prompt + answer)[-1].argmax()))
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees", "transport"),
    [
        pytest.param(*case, id="{}-{} to {}-{}".format(case[0], *case[1], case[2]), marks=marks)
        for case in CASES
        for marks in [marks_of(case)]
    ],
)
def test_workers_of_other_degrees_hand_over_and_the_tokens_are_transformers(
    serving_one_test: Serving,
    tmp_path: Path,
    kind: str,
    degrees: tuple[int, int],
    transport: str,
) -> None:
    folder = write_model(kind, tmp_path / "model")
    model = loaded(folder)
    prefill, decode = ({"tensor_parallel_size": degree} for degree in degrees)
    server = serving_one_test(
        arguments=("--model", str(folder)),
        settings={
            "engine": {"dtype": "float32", "kv_cache_bytes": 16_777_216},
            "pools": {"prefill": prefill, "decode": decode},
            "kv_transfer": {"verify": True, "transport": transport},
            "routing": {"local_prefill_max_tokens": 0},
        },
    )
    for worker_id, degree in zip(("prefill-0", "decode-0"), degrees, strict=True):
        assert len(descendants(server.worker_pid(worker_id))) == degree - 1
    for prompt in PROMPTS:
        done = server.complete(prompt=prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
        assert done["choices"][0]["token_ids"] == greedy(model, prompt)
    server.wait_at_rest()
    assert server.metric("baton_kv_handoffs_total", outcome="ready") == len(PROMPTS)
    assert server.metric("baton_kv_handoff_bytes_total", transport=transport) > 0
