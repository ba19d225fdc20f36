"""From a gateway's Open to a sequence the engine can run, or a refusal by name."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from baton.errors import ContextLengthError, InvalidRequestError, UnsupportedError
from baton.records import Role, context_needed
from baton.v1 import session_pb2 as pb
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence
from engine.setup import EnginePlan


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a sequence ends: the same for a prefill and a decode worker."""

    max_tokens: int
    stop_token_ids: frozenset[int]

    def reason(self, token_id: int, num_emitted_tokens: int) -> pb.CloseReason.ValueType | None:
        """Why the sequence ends with ``token_id`` as its last token, or None."""
        if token_id in self.stop_token_ids:
            return pb.CLOSE_REASON_STOP
        if num_emitted_tokens >= self.max_tokens:
            return pb.CLOSE_REASON_LENGTH
        return None


def check_open(message: pb.Open, plan: EnginePlan, role: Role) -> None:
    """Raises a leaf of InvalidRequestError for what this worker of ``role`` cannot run."""
    if message.adapter:
        raise UnsupportedError(f"adapter {message.adapter!r}: adapters are not supported yet")
    if message.grammar:
        raise UnsupportedError("grammar: structured output is not supported yet")
    num_input = len(message.prompt_token_ids) + len(message.emitted_token_ids)
    if not message.prompt_token_ids:
        raise InvalidRequestError("the prompt has no tokens")
    if len(message.emitted_token_ids) >= message.max_tokens:
        raise InvalidRequestError("every token that max_tokens allows is emitted already")
    needed = context_needed(
        role,
        num_prompt_tokens=len(message.prompt_token_ids),
        num_emitted_tokens=len(message.emitted_token_ids),
        max_tokens=message.max_tokens,
    )
    if needed > plan.max_model_len:
        what = "the input and its first token" if role == "prefill" else "prompt and answer"
        raise ContextLengthError(
            f"{what} need {needed} tokens; this {role} worker holds {plan.max_model_len}"
        )
    vocab_size = plan.checkpoint.config.vocab_size
    if num_input and max(*message.prompt_token_ids, *message.emitted_token_ids, 0) >= vocab_size:
        raise InvalidRequestError(f"a token id is not below the vocabulary's size, {vocab_size}")
    if max(message.sampling.logit_bias, default=0) >= vocab_size:
        raise InvalidRequestError(f"logit_bias: an id is not below the vocabulary's {vocab_size}")


def sequence_from_open(key: Hashable, message: pb.Open, plan: EnginePlan) -> Sequence:
    """A sequence with nothing computed, after ``check_open``."""
    return Sequence(
        key=key,
        token_ids=[*message.prompt_token_ids, *message.emitted_token_ids],
        num_prompt_tokens=len(message.prompt_token_ids),
        sampling=_sampling(message, plan.checkpoint.config.vocab_size),
        root_hash=plan.domain.root(adapter=message.adapter, cache_salt=message.cache_salt),
    )


def _sampling(message: pb.Open, vocab_size: int) -> SamplingParams:
    sampling = message.sampling
    has_logprobs = sampling.HasField("num_logprobs")
    return SamplingParams(
        seed=sampling.seed,
        choice_index=message.choice_index,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        min_tokens=sampling.min_tokens,
        # A checkpoint may name an end-of-sequence id that its model has no logit for.
        stop_token_ids=tuple(id_ for id_ in message.stop_token_ids if id_ < vocab_size),
        num_logprobs=min(sampling.num_logprobs, vocab_size) if has_logprobs else None,
    )


def stop_rule(message: pb.Open) -> StopRule:
    return StopRule(message.max_tokens, frozenset(message.stop_token_ids))
