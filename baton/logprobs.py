"""The log-probabilities that accompany a token from the sampler to the client."""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import session_pb2 as pb


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of softmax(logits) at one token's position.

    They are the model's own: no penalty, bias, temperature or limit is in them.
    """

    logprob: float
    """Of the token itself."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens' ids and log-probabilities, in falling order."""

    @classmethod
    def from_proto(cls, message: pb.TokenLogprobs) -> TokenLogprobs:
        top = zip(message.top_token_ids, message.top_logprobs, strict=True)
        return cls(message.logprob, tuple(top))

    def to_proto(self, index: int = 0) -> pb.TokenLogprobs:
        """``index``: of the token in its batch."""
        return pb.TokenLogprobs(
            index=index,
            logprob=self.logprob,
            top_token_ids=[token_id for token_id, _ in self.top],
            top_logprobs=[logprob for _, logprob in self.top],
        )
