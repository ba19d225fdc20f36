"""What the simulation is given: users and their turns, in tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from benchmarks.routing.simulation import Turn
from benchmarks.routing.trace import Chat

_VOCABULARY = 40_000
MOONCAKE_SCALE = 32
"""Tokens of that trace that one simulated token stands for: its blocks of 512 become 16."""


def from_chats(chats: Sequence[Chat], *, seed: int = 0) -> list[list[Turn]]:
    """The prompts that the embedded model's template and tokenizer make of a trace.

    Answers are random tokens, as many as each message allows: which ones the model would
    draw does not matter to a cache.
    """
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    rng = random.Random(seed)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    users: list[list[Turn]] = []
    for chat in chats:
        prompt, turns = ids(f"<|im_start|>system\n{chat.system}<|im_end|>\n"), list[Turn]()
        for message in chat.turns:
            question = f"<|im_start|>user\n{message.text}<|im_end|>\n<|im_start|>assistant\n"
            prompt = [*prompt, *ids(question)]
            answer = [rng.randrange(_VOCABULARY) for _ in range(message.max_tokens)]
            turns.append(Turn(message.think_s, prompt, answer))
            prompt = [*prompt, *answer, *ids("<|im_end|>\n")]
        users.append(turns)
    return users


def from_recording(path: Path, chats: Sequence[Chat]) -> list[list[Turn]]:
    """What ``replay --record`` wrote: the very tokens, with the trace's think times."""
    found: dict[tuple[int, int], Turn] = {}
    for line in path.read_text().splitlines():
        data = json.loads(line)
        user, number = data["user"], data["turn"]
        think_s = chats[user].turns[number].think_s
        found[user, number] = Turn(think_s, data["prompt"], data["answer"])
    return [
        [turn for (user, _), turn in sorted(found.items(), key=lambda i: i[0]) if user == each]
        for each in sorted({user for user, _ in found})
    ]


def hot_prompt(
    *, num_users: int = 200, shared_tokens: int = 1024, own_tokens: int = 64, rate: float = 4.0
) -> list[list[Turn]]:
    """Strangers who share one long system prompt, ``rate`` of them a second."""
    rng = random.Random(0)
    shared = [rng.randrange(_VOCABULARY) for _ in range(shared_tokens)]

    def some(number: int) -> list[int]:
        return [rng.randrange(_VOCABULARY) for _ in range(number)]

    at = 0.0
    users: list[list[Turn]] = []
    for _ in range(num_users):
        at += rng.expovariate(rate)
        users.append([Turn(at, [*shared, *some(own_tokens)], some(24))])
    return users


def from_mooncake(path: Path, *, limit: int) -> list[list[Turn]]:
    """Requests of Mooncake's conversation trace (FAST'25), each sent at its time.

    Its blocks of 512 tokens become blocks of 16; lengths are divided alike.
    """
    users: list[list[Turn]] = []
    with path.open() as lines:
        for number, line in enumerate(lines):
            if number == limit:
                break
            data = json.loads(line)
            length = max(1, data["input_length"] // MOONCAKE_SCALE)
            prompt = [token for block in data["hash_ids"] for token in [block] * 16][:length]
            answer = [number] * max(1, data["output_length"] // MOONCAKE_SCALE)
            users.append([Turn(data["timestamp"] / 1000, prompt, answer)])
    return users
