"""One choice's tokens, put in order by position.

Both workers of a hand-off send the first token, and events of two Sessions may
overtake each other: each position counts once, and none is passed over::

    positions   0 1 2 3 4 5 6
                ├─taken─┤      given to the client
                ├──in order──┤  token_ids
                                6: ahead, waits for what is missing before it

Log-probabilities, where they are wanted, come and go with their tokens.
"""

from __future__ import annotations

from baton.errors import InternalError
from baton.logprobs import TokenLogprobs
from router.request import Arrival


class TokenMerge:
    """Holds at most ``limit`` tokens; lives as long as the choice, over all its attempts."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._token_ids: list[int] = []
        self._num_taken = 0
        self._arrivals: list[Arrival] = []
        self._logprobs: list[TokenLogprobs] = []
        self._ahead: dict[int, tuple[int, TokenLogprobs | None]] = {}

    @property
    def token_ids(self) -> list[int]:
        """All tokens up to the first missing one, taken ones included. Not to be changed."""
        return self._token_ids

    @property
    def num_in_order(self) -> int:
        """Position of the first missing token."""
        return len(self._token_ids)

    def add(
        self, position: int, token_id: int, at: float, logprobs: TokenLogprobs | None = None
    ) -> None:
        """Takes a token in, once; ``at`` is when it came, in seconds.

        Raises: InternalError for a position over the limit, and for one that came
        before with another token: then a worker has mixed something up.
        """
        known = self._known(position)
        if known is not None:
            if known != token_id:
                raise InternalError(f"two workers disagree on the token at position {position}")
            return
        if position >= self._limit:
            raise InternalError(f"a worker sent a token past the limit of {self._limit}")
        self._ahead[position] = (token_id, logprobs)
        num_before = len(self._token_ids)
        while (following := self._ahead.pop(len(self._token_ids), None)) is not None:
            self._token_ids.append(following[0])
            if following[1] is not None:
                self._logprobs.append(following[1])
        self._came(len(self._token_ids) - num_before, at)

    def _came(self, num_tokens: int, at: float) -> None:
        """Notes tokens that are in order since ``at``: before, nobody could have had them."""
        if self._arrivals and self._arrivals[-1].at == at:
            num_tokens += self._arrivals.pop().num_tokens
        if num_tokens:
            self._arrivals.append(Arrival(at, num_tokens))

    def take(self) -> tuple[tuple[int, ...], tuple[Arrival, ...], tuple[TokenLogprobs, ...]]:
        """The tokens in order that were not taken yet, how they came, and those
        log-probabilities that came with them."""
        taken = tuple(self._token_ids[self._num_taken :])
        self._num_taken += len(taken)
        arrivals, self._arrivals = tuple(self._arrivals), []
        logprobs, self._logprobs = tuple(self._logprobs), []
        return taken, arrivals, logprobs

    def forget_ahead(self) -> None:
        """Drops what waits for a missing token: the attempt that sent it has failed."""
        self._ahead.clear()

    def _known(self, position: int) -> int | None:
        if position < len(self._token_ids):
            return self._token_ids[position]
        waiting = self._ahead.get(position)
        return None if waiting is None else waiting[0]
