"""A validated request to the choices that the orchestrator is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from baton.checkpoint.checkpoint import Checkpoint
from baton.config import BatonConfig
from baton.errors import ContextLengthError, InvalidRequestError, UnavailableError
from baton.timeline import Timeline
from router.gateway.context import RequestContext
from router.gateway.endpoint import Job
from router.gateway.schema import GenerationRequest
from router.request import ChoiceRequest, SamplingParams
from router.status import ClusterStatus
from router.tokenization.tokenizer import PromptTokenizer

_GREEDY_BELOW = 1e-6
"""Temperatures and top_p travel as 32-bit floats: below this, dividing by one overflows, and
the distribution has long been the greedy one."""
_REPLACED_S = 5.0
"""A worker that is lost is replaced in some seconds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``choices[i * n + j]`` is the j-th of prompt i; its place is its choice index."""

    prompts: tuple[tuple[int, ...], ...]
    choices: tuple[ChoiceRequest, ...]


class Planner:
    """Knows the model's and the configuration's bounds."""

    def __init__(
        self, config: BatonConfig, checkpoint: Checkpoint, tokenizer: PromptTokenizer
    ) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        gateway = config.gateway
        # More than can be in flight and queued together could never be admitted.
        self._max_choices = min(gateway.max_choices, gateway.max_in_flight + gateway.max_queued)
        self._own_context = checkpoint.config.max_position
        self._configured = _configured_context(config, checkpoint.config.max_position)

    def context_length(self, status: ClusterStatus) -> int:
        """Tokens of prompt and answer together, as the ready workers can serve at most; while
        no decode worker is ready, as the largest decode pool is configured for."""
        ready = status.max_model_len
        return self._configured if ready is None else ready

    async def plan(
        self,
        job: Job,
        context: RequestContext,
        *,
        status: ClusterStatus,
        deadline: float,
        with_timeline: bool = False,
    ) -> Plan:
        """Raises InvalidRequestError or ContextLengthError, naming the field, and
        UnavailableError for what only workers hold that were lost lately."""
        request = job.request
        self._check_token_ids(request)
        self._check_count(job.num_prompts, request.n)
        length = self.context_length(status)
        recent = max(length, status.recent_max_model_len or 0)
        encoded = await job.encode(
            self._tokenizer, context=recent, vocab_size=self._checkpoint.config.vocab_size
        )
        prompts = tuple(tuple(ids) for ids in encoded)
        longest = max(map(len, prompts), default=0) + (job.max_tokens[1] or 1)
        if length < longest <= recent:
            raise UnavailableError(
                f"prompt and answer need {longest} tokens; the decode workers that are ready hold "
                f"{length}, and one that held {recent} was lost: send the request again later",
                retry_after_s=_REPLACED_S,
            )
        whose = "model's context" if length >= self._own_context else "largest decode worker"
        limits = [_max_tokens(job, len(prompt), length, whose=whose) for prompt in prompts]
        _check_min_tokens(request.min_tokens, min(limits))
        sampling = self._sampling(job)
        stop_token_ids = frozenset(request.stop_token_ids)
        if not request.ignore_eos:
            stop_token_ids |= frozenset(self._checkpoint.eos_token_ids)
        choices = tuple(
            ChoiceRequest(
                request_id=context.request_id,
                choice_index=index,
                prompt_token_ids=prompts[index // request.n],
                sampling=sampling,
                max_tokens=limits[index // request.n],
                stop_token_ids=stop_token_ids,
                deadline=deadline,
                traceparent=context.trace.traceparent,
                tracestate=context.trace.tracestate,
                cache_salt=request.cache_salt,
                priority=request.priority,
                timeline=Timeline() if with_timeline else None,
            )
            for index in range(len(prompts) * request.n)
        )
        return Plan(prompts, choices)

    def _sampling(self, job: Job) -> SamplingParams:
        request = job.request
        greedy = min(request.temperature, request.top_p) < _GREEDY_BELOW
        seed = secrets.randbits(64) if request.seed is None else request.seed
        return SamplingParams(
            seed=seed % 2**64,
            temperature=0.0 if greedy else request.temperature,
            top_p=1.0 if greedy else request.top_p,
            top_k=min(max(request.top_k, 0), self._checkpoint.config.vocab_size),
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=tuple((int(id_), bias) for id_, bias in request.logit_bias.items()),
            min_tokens=request.min_tokens,
            num_logprobs=job.num_logprobs,
        )

    def _check_count(self, num_prompts: int, n: int) -> None:
        if num_prompts * n > self._max_choices:
            raise InvalidRequestError(
                f"{num_prompts} prompt(s) times n = {n} is over the {self._max_choices} choices "
                "that one request may have",
                param="prompt" if num_prompts > self._max_choices else "n",
            )

    def _check_token_ids(self, request: GenerationRequest) -> None:
        vocab_size = self._checkpoint.config.vocab_size
        named = [(f"stop_token_ids.{at}", id_) for at, id_ in enumerate(request.stop_token_ids)]
        named += [(f"logit_bias.{id_}", int(id_)) for id_ in request.logit_bias]
        for path, token_id in named:
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"'{path}': token id {token_id} is outside the vocabulary of {vocab_size}",
                    param=path,
                )


def _configured_context(config: BatonConfig, own: int) -> int:
    """``own``: the checkpoint's limit."""
    lengths = [
        config.for_pool(name).engine.max_model_len or own
        for name, pool in config.pools.items()
        if pool.role == "decode"
    ]
    return min(own, max(lengths, default=own))


def _max_tokens(job: Job, num_prompt_tokens: int, context_length: int, *, whose: str) -> int:
    """The client's bound, else all that is left of the ``context_length`` that ``whose`` is."""
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt has no tokens", param=job.prompt_field)
    left = context_length - num_prompt_tokens
    if left < 1:
        raise ContextLengthError(
            f"the {whose} holds {context_length} tokens, one of them of the answer; "
            f"the prompt has {num_prompt_tokens}",
            param=job.prompt_field,
        )
    name, asked = job.max_tokens
    if asked is not None and asked > left:
        raise ContextLengthError(
            f"'{name}' is {asked}, but the {whose} holds {context_length} tokens and "
            f"the prompt has {num_prompt_tokens}: at most {left} are left",
            param=name,
        )
    return left if asked is None else asked


def _check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {min_tokens}, but the answer has room for {max_tokens} tokens",
            param="min_tokens",
        )


def usage(
    prompts: Sequence[Sequence[int]], num_cached: Sequence[int], num_completion: int
) -> dict[str, object]:
    """The OpenAI usage object; every prompt counts once, however many its choices."""
    num_prompt = sum(map(len, prompts))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(num_cached)},
    }
