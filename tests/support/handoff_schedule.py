"""Seeded faults in hand-offs: which worker, at which of its fault points, is killed, stopped or
delayed when, and what clients ask for meanwhile. Pure: a seed and a number name a case.

Cases come in rounds, each with every fault point of a worker once, over one transport or
another. ``COVER`` rounds have every point with a kill and a stop over each transport, and with
a delay.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from baton.config import KvTransferConfig
from baton.faults import POINTS
from kv_transfer.handshake import allowed_transports

Action = Literal["kill", "stop", "delay"]

SEED = int(os.environ.get("CHAOS_SEED", "0"))
TRANSPORTS = allowed_transports(KvTransferConfig(), on_gpu=False)
"""What is installed here."""
WORKER_POINTS = sorted(point for point in POINTS if point.startswith(("prefill.", "decode.")))
TWO_SIDED = {"prefill.send": ("gloo",)}
"""Points that hand-offs over other transports do not pass."""
HANDSHAKE = ("prefill.greet", "prefill.link", "decode.greet", "decode.link")
ROUND = len(WORKER_POINTS)
COVER = 2 * len(TRANSPORTS) + 1

MODEL = {"num_kv_heads": 8, "head_dim": 16}
SETTINGS: dict[str, dict[str, object]] = {
    "engine": {
        "dtype": "float32",
        "block_size": 8,
        "kv_cache_bytes": 2 * 1024 * 1024,  # 128 blocks of MODEL: room is scarce
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
    },
    "pools": {  # what a prefill worker gives back is soon another's
        "prefill": {"replicas": 2, "engine": {"kv_cache_bytes": 1024 * 1024}},
        "decode": {"replicas": 2},
    },
    "kv_transfer": {"operation_s": 0.8, "lease_s": 1.0, "attach_s": 2.0},
    "session": {"report_s": 0.1, "silence_s": 1.5},
    "registry": {"heartbeat_s": 0.3, "poll_s": 0.1, "ttl_s": 2.4},
    "cluster": {"fence_s": 0.8},
    "routing": {"local_prefill_max_tokens": 0},
}
FENCED = "until it is fenced"
STOPS: dict[str, tuple[float, float] | None] = {
    "for a moment": (0.05, 0.4),
    "longer than its lease": (1.1, 1.4),
    "longer than its Session": (1.6, 2.0),
    "longer than its registration": (2.8, 3.1),
    FENCED: None,
}
"""Seconds. Those between two bounds keep a beat's distance of the upper one."""
REPLACED = (FENCED, "longer than its registration")
_OFTEN = list(STOPS)[:3]
"""Every round has each kind once, and more of these, which take less time."""
_LATEST_HIT = {"prefill.chunk": 8, "decode.step": 12, "decode.copy": 5, "prefill.offer": 5}
_NUM_QUESTIONS = 24
_TOKENS = range(3, 259)
"""Of the tiny model: no special ones."""


@dataclass(frozen=True, slots=True)
class Question:
    """What has one right answer."""

    prompt: tuple[int, ...] = field(repr=False)
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A question as a client asks it."""

    question: Question
    at_s: float
    stream: bool
    leaves: bool
    """The client does not stay to the end: it goes after ``leaves_after`` tokens, or seconds
    where it does not stream."""
    leaves_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    seed: int
    number: int
    transport: str
    point: str
    victim: str
    action: Action
    how: str
    """Of a stop, a key of ``STOPS``."""
    seconds: float
    """Of a delay, or a stop that ends by itself."""
    hit: int
    warm: bool
    """Its prompts may be cached from earlier cases."""
    asks: tuple[Ask, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.transport}-{self.number:03}"

    @property
    def role(self) -> str:
        """The victim's."""
        return self.point.split(".")[0]

    @property
    def is_replaced(self) -> bool:
        """The victim's process does not outlive the case."""
        return self.action == "kill" or self.how in REPLACED

    def __str__(self) -> str:
        lasting = {"kill": "", "delay": f" {self.seconds:.2f} s"}.get(
            self.action, f" {self.how}" + (f" ({self.seconds:.2f} s)" if self.seconds else "")
        )
        return (
            f"{self.name}: {self.action}{lasting} of {self.victim} at {self.point}, "
            f"hit {self.hit}, {len(self.asks)} requests{', warm' if self.warm else ''}; again: "
            f'CHAOS_SEED={self.seed} make chaos-handoff ARGS="-s -k {self.name}"'
        )


def _random(*names: object) -> random.Random:
    return random.Random("/".join(map(str, names)))


def _course(seed: int, point: str, number_of_round: int) -> tuple[str, Action]:
    """The transport and the action of a point in a round. The points go through all that
    can happen to them one behind the other, so that a round has as many kills as stops."""
    transports = [name for name in TRANSPORTS if name in TWO_SIDED.get(point, TRANSPORTS)]
    actions: tuple[Action, ...] = ("kill", "stop")
    courses = [
        (transport, actions[(at + begin) % 2])
        for begin in range(2)
        for at, transport in enumerate(transports)
    ]
    courses.append((_random(seed, point, number_of_round).choice(transports), "delay"))
    behind = _random(seed, "points").sample(WORKER_POINTS, ROUND).index(point)
    return courses[(number_of_round + behind) % len(courses)]


def questions(seed: int, number_of_round: int) -> list[Question]:
    """What a round's cases ask; some begin alike."""
    rng = _random(seed, number_of_round, "questions")
    stems = [rng.choices(_TOKENS, k=192) for _ in range(2)]

    def draw() -> Question:
        begin = rng.choice(stems)[: rng.randrange(16, 193)] if rng.random() < 0.6 else []
        prompt = begin + rng.choices(_TOKENS, k=rng.randrange(1, 140))
        max_tokens = 1 if rng.random() < 0.08 else rng.randrange(2, 41)
        temperature = rng.choice((0.0, 0.0, 1.0))
        return Question(tuple(prompt), max_tokens, temperature, rng.randrange(2**31))

    return [draw() for _ in range(_NUM_QUESTIONS)]


def _ask(rng: random.Random, question: Question, latest_s: float) -> Ask:
    """Most come together, some up to ``latest_s`` later."""
    at_s = rng.uniform(0.0, 0.15) if rng.random() < 0.7 else rng.uniform(0.0, latest_s)
    stream = rng.random() < 0.7
    leaves = rng.random() < 0.2
    after = rng.randrange(question.max_tokens) if stream else rng.uniform(0.02, 0.4)
    return Ask(question, at_s, stream, leaves, after if leaves else 0.0)


def _case(
    seed: int, number_of_round: int, point: str, course: tuple[str, Action], how: str
) -> Case:
    rng = _random(seed, number_of_round, point)
    transport, action = course
    bounds = STOPS[how] if action == "stop" else (0.05, 1.6)
    seconds = 0.0 if action == "kill" or bounds is None else rng.uniform(*bounds)
    asked = rng.sample(questions(seed, number_of_round), rng.randrange(6, 9))
    return Case(
        seed=seed,
        number=0,
        transport=transport,
        point=point,
        victim=f"{point.split('.')[0]}-{rng.randrange(2)}",
        action=action,
        how=how,
        seconds=seconds,
        hit=1 if point in HANDSHAKE else rng.randint(1, _LATEST_HIT.get(point, 3)),
        warm=rng.random() < 0.3,
        asks=tuple(_ask(rng, question, min(1.6, seconds or 1.6)) for question in asked),
    )


def _by_turns(cases: list[Case]) -> list[Case]:
    """Workers are replaced by turns: the sooner one dies again, the later it is started."""
    turns: Counter[tuple[str, str]] = Counter()
    spread = []
    for case in cases:
        of = case.transport, case.role
        spread.append(
            replace(case, victim=f"{case.role}-{turns[of] % 2}") if case.is_replaced else case
        )
        turns[of] += case.is_replaced
    return spread


def _with_handshakes(cases: list[Case], handshakes: list[Case]) -> list[Case]:
    """Handshakes come behind cases that replace a worker, and are of the new one: it has
    shaken no hands."""
    ordered = list(cases)
    for case in handshakes:
        for at, before in enumerate(ordered, 1):
            is_next = at < len(ordered) and ordered[at].point in HANDSHAKE
            alike = before.role == case.role and before.transport == case.transport
            if before.is_replaced and alike and not is_next:
                ordered.insert(at, replace(case, victim=before.victim))
                break
        else:
            ordered.append(case)
    return ordered


def cases_of_round(seed: int, number_of_round: int) -> list[Case]:
    """Every point once, grouped by transport."""
    rng = _random(seed, number_of_round)
    courses = {
        point: _course(seed, point, number_of_round) for point in rng.sample(WORKER_POINTS, ROUND)
    }
    num_stops = sum(action == "stop" for _, action in courses.values())
    hows = [*STOPS, *rng.choices(_OFTEN, k=max(0, num_stops - len(STOPS)))]
    rng.shuffle(hows)
    cases = [
        _case(seed, number_of_round, point, course, hows.pop() if course[1] == "stop" else "")
        for point, course in courses.items()
    ]
    ordered = _with_handshakes(
        _by_turns([case for case in cases if case.point not in HANDSHAKE]),
        [case for case in cases if case.point in HANDSHAKE],
    )
    ordered.sort(key=lambda case: TRANSPORTS.index(case.transport))
    return [replace(case, number=number_of_round * ROUND + at) for at, case in enumerate(ordered)]
