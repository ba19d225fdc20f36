"""A committed trace of chats: who writes what, and how long each user thinks before it.

One JSON object a line, one line a user::

    {"user": 0, "system": "…", "turns": [{"think_s": 3.1, "text": "…", "max_tokens": 32}, …]}

``think_s`` passes between the end of the answer before and this message; before the first
message it is when the user comes. Answers are the model's, so they are not in the trace.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULT_TRACE = Path(__file__).parent / "traces" / "chat_20_users.jsonl"

_SYSTEM = (
    "You are a helpful assistant in a small library. Answer in plain words, be brief, and say "
    "so when you do not know."
)
_SUBJECTS = (
    *("tides", "bread", "the moon", "bicycles", "volcanoes", "chess", "honey bees", "glass"),
    *("the Roman roads", "paper", "thunder", "maps", "salt", "lighthouses", "rice", "clocks"),
    *("whales", "bridges", "silk", "compilers", "snow", "violins", "coffee", "deserts"),
)
_OPENINGS = (
    "Tell me about {0}.",
    "What should a child know about {0}?",
    "Why are people so fond of {0}? Give me two reasons.",
    "I am writing a short text about {0}. How would you begin?",
)
_FOLLOW_UPS = (
    "Go on, please.",
    "And how does that compare with {0}?",
    "Say it again in simpler words, for somebody who has only ever heard of {0}.",
    "What do experts still disagree about there?",
    "Is there a connection with {0}? One sentence is enough.",
    "Make a list of three points out of it.",
    "Who found that out, and when?",
)
_PASTED = (
    "People have known of {0} for as long as there are records, and every age has told a "
    "different story about them.",
    "In the spring of that year the council asked for a report on {0}, which nobody read.",
    "My grandmother kept a drawer full of notes on {0}; most of them contradict each other.",
    "The measurements were taken twice, once near {0} and once far away from them.",
    "It is often said that {0} cannot be understood without arithmetic, and that is half true.",
    "Trade in {0} made three families rich and a whole coast poor.",
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn's, before the model has answered."""

    think_s: float
    text: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Chat:
    """One user's whole conversation."""

    user: int
    system: str
    turns: tuple[Message, ...]


def generate(
    *, num_users: int, num_turns: int, think_median_s: float, arrive_s: float, seed: int
) -> list[Chat]:
    """Chats that all go on at once until the end: users arrive within ``arrive_s``.

    Think times are lognormal (σ = 1: people answer at once, or fetch a coffee first),
    at most twelve medians. A third of the messages bring a pasted passage along.
    """
    rng = random.Random(seed)

    def message(number: int) -> Message:
        think_s = min(rng.lognormvariate(0, 1), 12.0) * think_median_s
        subject = rng.choice(_SUBJECTS)
        text = rng.choice(_FOLLOW_UPS if number else _OPENINGS).format(subject)
        if rng.random() < 1 / 3:
            pasted = rng.sample(_PASTED, rng.randint(2, len(_PASTED)))
            text += " I found this: " + " ".join(line.format(subject) for line in pasted)
        if number == 0:
            think_s = rng.uniform(0, arrive_s)
        return Message(round(think_s, 2), text, rng.choice((16, 24, 32, 48)))

    return [
        Chat(user, _SYSTEM, tuple(message(number) for number in range(num_turns)))
        for user in range(num_users)
    ]


def save(chats: Sequence[Chat], path: Path) -> None:
    path.write_text("".join(json.dumps(asdict(chat)) + "\n" for chat in chats))


def load(path: Path) -> list[Chat]:
    """Raises ValueError, naming the line, for a file that is no such trace."""
    chats: list[Chat] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            data = json.loads(line)
            turns = tuple(Message(**turn) for turn in data["turns"])
            chats.append(Chat(data["user"], data["system"], turns))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: no chat ({error})") from None
    return chats


def shortened(chats: Sequence[Chat], *, num_users: int, num_turns: int) -> list[Chat]:
    """The first turns of the first users."""
    return [Chat(chat.user, chat.system, chat.turns[:num_turns]) for chat in chats[:num_users]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing.trace", description="Writes a trace of chats anew."
    )
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--think-median-s", type=float, default=8.0)
    parser.add_argument("--arrive-s", type=float, default=20.0, help="users come within this time")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--out", type=Path, default=DEFAULT_TRACE)
    given = parser.parse_args()
    chats = generate(
        num_users=given.users,
        num_turns=given.turns,
        think_median_s=given.think_median_s,
        arrive_s=given.arrive_s,
        seed=given.seed,
    )
    save(chats, given.out)
    print(f"{given.out}: {len(chats)} users, {sum(len(chat.turns) for chat in chats)} messages")


if __name__ == "__main__":
    main()
