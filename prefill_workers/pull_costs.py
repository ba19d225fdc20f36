"""Whether tokens that decode holds are there sooner moved or computed, by what both took lately."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

HALF_LIFE_S = 60.0
"""Of the weight of a measurement. What was slow once is tried again when it is forgotten."""
FORGOTTEN_S = 30 * HALF_LIFE_S
"""A lender that was not measured for so long is as one that never was."""
MIN_BLOCKS = 4
"""Fewer are computed: they are part of a step that is taken anyway."""
SHORTEST_S = 0.05
"""Of the patience with a pull: below it a loaded machine's own pauses would decide."""
_PRIOR_TOKENS = (64, 1024)
_PRIOR_WEIGHT = 0.1
_PRIOR_COMPUTED = (5e-3, 2e-4)
"""Seconds of a step and of each of its tokens."""
_PRIOR_MOVED_S = 5e-3
_PRIOR_BYTES_PER_S = 1e9


class RunningLine:
    """Seconds as a line over tokens: the least-squares fit to measurements that fade, and to two
    made-up points with a little weight that does not."""

    def __init__(self, fixed_s: float, token_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        points = [(num_tokens, fixed_s + token_s * num_tokens) for num_tokens in _PRIOR_TOKENS]
        self._prior = [0.0] * 5
        for num_tokens, seconds in points:
            self._prior = _sums(self._prior, num_tokens, seconds, _PRIOR_WEIGHT)
        self._seen = [0.0] * 5

    @property
    def forgotten(self) -> bool:
        return self._clock() - self._at > FORGOTTEN_S

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._seen = _sums(self._faded(), num_tokens, seconds, 1.0)
        self._at = self._clock()

    def fit(self) -> tuple[float, float]:
        """Seconds of anything at all, and of each token; neither is negative."""
        pairs = zip(self._prior, self._faded(), strict=True)
        weight, n, nn, t, nt = (prior + seen for prior, seen in pairs)
        token_s = (weight * nt - n * t) / (weight * nn - n * n)
        if token_s < 0:
            return t / weight, 0.0
        fixed_s = (t - token_s * n) / weight
        return (fixed_s, token_s) if fixed_s >= 0 else (0.0, nt / nn)

    def _faded(self) -> list[float]:
        kept = 0.5 ** ((self._clock() - self._at) / HALF_LIFE_S)
        return [kept * each for each in self._seen]


def _sums(sums: Sequence[float], n: int, t: float, weight: float) -> list[float]:
    terms = (1.0, n, n * n, t, n * t)
    return [one + weight * term for one, term in zip(sums, terms, strict=True)]


class PullCosts:
    """Kept by one prefill worker. What moving takes is kept for each lender, a decode process, by
    its epoch: of one that stops or dies in the midst of a pull nothing follows for the others,
    nor for the one that replaces it.

    Args:
        block_size: in tokens.
        token_bytes: of one token's KV.
        step_tokens: that a step computes at most.
    """

    def __init__(
        self,
        *,
        block_size: int,
        token_bytes: int,
        step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._min_tokens = MIN_BLOCKS * block_size
        self._step_tokens = step_tokens
        self._clock = clock
        self._moved_token_s = token_bytes / _PRIOR_BYTES_PER_S
        self._computed = RunningLine(*_PRIOR_COMPUTED, clock)
        self._unmeasured = self._new_line()
        self._moved: dict[bytes, RunningLine] = {}

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step has taken so long."""
        self._computed.observe(num_tokens, seconds)

    def moved(self, num_tokens: int, seconds: float, lender: bytes) -> None:
        """A pull has taken so long, from its beginning to its end. One that a pause of the machine
        held up counts as a late one: the pause itself would not be forgotten within minutes."""
        self._line_of(lender).observe(num_tokens, min(seconds, self._late_s(num_tokens)))

    def late(self, num_tokens: int, lender: bytes) -> None:
        """A pull was given up after its patience. Nobody knows how long it would have taken: so
        long that it is not tried for a while with that lender."""
        self._line_of(lender).observe(num_tokens, self._late_s(num_tokens))

    def moving_pays(self, num_tokens: int, lender: bytes) -> bool:
        if num_tokens < self._min_tokens:
            return False
        fixed_s, token_s = self._moved.get(lender, self._unmeasured).fit()
        return fixed_s + token_s * num_tokens < self._computing_s(num_tokens)

    def patience_s(self, num_tokens: int) -> float:
        """With a pull: as long as computing would take."""
        return max(SHORTEST_S, self._computing_s(num_tokens))

    def _new_line(self) -> RunningLine:
        return RunningLine(_PRIOR_MOVED_S, self._moved_token_s, self._clock)

    def _line_of(self, lender: bytes) -> RunningLine:
        """To add a measurement to."""
        if lender not in self._moved:
            kept = {each: line for each, line in self._moved.items() if not line.forgotten}
            self._moved = {**kept, lender: self._new_line()}
        return self._moved[lender]

    def _late_s(self, num_tokens: int) -> float:
        return 2 * self.patience_s(num_tokens)

    def _computing_s(self, num_tokens: int) -> float:
        """Its part of the steps that it fills."""
        step_s, token_s = self._computed.fit()
        return token_s * num_tokens + step_s * num_tokens / self._step_tokens
