"""What is the time to the first token of a second turn, after a long answer, with and without
the pull of that answer from the decode worker?

Two servers of one prefill and one decode worker that never prefills by itself: on one, prefill
workers may pull, on the other not. Conversations of their own are begun together on the first,
then their second turns asked one after another; then the same on the second. Printed are the
medians, and how many tokens prefill computed and pulled for a second turn.

    python -m benchmarks.second_turn --conversations 5 --answer 1000
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from baton.errors import BatonError
from benchmarks.chat_client import new_client, served_model
from benchmarks.chat_stream import RequestFailed
from benchmarks.server import BatonServer

NUM_PROMPT, NUM_NEW, NUM_SECOND = 200, 20, 8
_VOCABULARY = range(1000, 40_000)
_REST_S = 1.0
"""Until the gateway has heard what the workers hold."""


@dataclass(frozen=True, slots=True)
class SecondTurn:
    ttft_ms: float
    num_computed: float
    num_pulled: float


class Conversations:
    """Of one server."""

    def __init__(self, server: BatonServer, client: httpx.Client) -> None:
        self._server = server
        self._client = client
        self._model = served_model(client).name

    def answer(self, prompt: list[int], num_tokens: int) -> list[int]:
        """A greedy answer of so many tokens."""
        token_ids, _ = self._ask(prompt, num_tokens)
        return token_ids

    def second_turn(self, prompt: list[int]) -> SecondTurn:
        before = self._prefill_tokens()
        _, ttft_ms = self._ask(prompt, NUM_SECOND)
        time.sleep(_REST_S)
        computed, received = (
            after - one for after, one in zip(self._prefill_tokens(), before, strict=True)
        )
        return SecondTurn(ttft_ms, computed, received)

    def _prefill_tokens(self) -> tuple[float, float]:
        page, name = self._server.page(), "baton_prompt_tokens_total"
        computed = page.metric(name, role="prefill", source="computed")
        return computed, page.metric(name, role="prefill", source="received")

    def _ask(self, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        token_ids: list[int] = []
        ttft_ms = 0.0
        began = time.monotonic()
        with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ValueError(f"the server gave a request up: {chunk['error']}")
                    token_ids += [t for c in chunk["choices"] for t in c.get("token_ids") or ()]
                    if token_ids and not ttft_ms:
                        ttft_ms = (time.monotonic() - began) * 1000
        return token_ids, ttft_ms


def measure(
    folder: Path, *, pulls: bool, num_conversations: int, num_answer: int
) -> list[SecondTurn]:
    """One more conversation comes first and is left out: it connects the workers."""
    routing = {"local_prefill_max_tokens": 0, "prefill_pulls": pulls}
    server = BatonServer(
        folder, settings={"routing": routing}, arguments=("--prefill", "1", "--decode", "1")
    )
    rng = random.Random(1)
    prompts = [rng.sample(_VOCABULARY, NUM_PROMPT) for _ in range(1 + num_conversations)]
    with server, new_client(server.url, timeout_s=300.0) as client:
        talks = Conversations(server, client)
        with ThreadPoolExecutor(len(prompts)) as together:
            answers = list(together.map(lambda each: talks.answer(each, num_answer), prompts))
        time.sleep(_REST_S)
        turns = []
        for prompt, answer in zip(prompts, answers, strict=True):
            new = rng.sample(_VOCABULARY, NUM_NEW)
            turns.append(talks.second_turn([*prompt, *answer, *new]))
    return turns[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.second_turn", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--answer", type=int, default=1000, help="tokens of the first answer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-second-turn-") as name:
        for pulls in (True, False):
            turns = measure(
                Path(name) / str(pulls),
                pulls=pulls,
                num_conversations=given.conversations,
                num_answer=given.answer,
            )
            ttfts = sorted(turn.ttft_ms for turn in turns)
            print(
                f"prefill_pulls {str(pulls).lower()}: second turn's TTFT "
                f"{statistics.median(ttfts):.0f} ms (median of {len(ttfts)}, {ttfts[0]:.0f} to "
                f"{ttfts[-1]:.0f}); prefill computed "
                f"{statistics.median(turn.num_computed for turn in turns):.0f} tokens and pulled "
                f"{statistics.median(turn.num_pulled for turn in turns):.0f}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, httpx.HTTPError, RequestFailed) as error:
        sys.exit(f"second_turn: {error}")
