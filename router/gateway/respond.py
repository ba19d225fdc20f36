"""Runs a generating request and answers it, whole or as a stream.

The status of a stream is held back until its first output, its error or one
keep-alive interval, so that what fails early has its true status. Whatever ends
the request early -- the client's leaving among it -- ends its choices too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError, CancelledError, InternalError
from router.gateway.call import Call
from router.gateway.choices import ChoiceStream, Delta
from router.gateway.context import RequestContext, context_of
from router.gateway.endpoint import Answer, Job
from router.gateway.generation import Generation
from router.gateway.logprobs import LoggedToken
from router.gateway.plan import Plan, usage
from router.gateway.services import Services
from router.gateway.sse import DONE, KEEP_ALIVE, EventStream, event, event_after, to_json
from router.tokenization.stop_strings import StopStrings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A request that is being generated."""

    call: Call
    plan: Plan
    runs: Sequence[ChoiceStream]
    generation: Generation


class GenerationResponse(Response):
    """One request, from its parsed body to the last byte of its answer."""

    def __init__(
        self, services: Services, job: Job, *, deadline: float, with_timeline: bool = False
    ) -> None:
        """``deadline``: on the event loop's clock; ``with_timeline``: tell where time went."""
        self.background = None
        self._services = services
        self._job = job
        self._deadline = deadline
        self._with_timeline = with_timeline
        self._return_token_ids = job.request.return_token_ids
        self._head = {
            "id": f"{job.id_prefix}{secrets.token_hex(16)}",
            "object": job.chunk_object if job.request.stream else job.answer_object,
            "created": int(time.time()),
            "model": services.model_id,
            "system_fingerprint": services.fingerprint,
        }
        self._encoded_head = to_json(self._head)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises BatonError only while nothing has been sent."""
        context = context_of(scope)
        stream = EventStream(send)
        try:
            await self._serve(context, receive, send, stream)
        except BatonError as error:
            if not stream.started:
                raise
            await self._fail(stream, context, error)
        except Exception:
            if not stream.started:
                raise
            _log.exception("request %s crashed", context.request_id)
            failure = InternalError("the gateway failed; its log says why under this request's id")
            await self._fail(stream, context, failure)

    async def _serve(
        self, context: RequestContext, receive: Receive, send: Send, stream: EventStream
    ) -> None:
        services = self._services
        call = Call(receive, deadline=self._deadline, lifecycle=services.lifecycle)
        async with call:
            plan = await services.planner.plan(
                self._job,
                context,
                status=services.orchestrator.status(),
                deadline=self._deadline,
                with_timeline=self._with_timeline,
            )
            context.num_prompt_tokens = sum(map(len, plan.prompts))
            runs, streams = self._runs(plan), self._job.request.stream
            try:
                silence_s = services.config.gateway.sse_keepalive_s if streams else None
                async with Generation(
                    runs, services.orchestrator, silence_s=silence_s
                ) as generation:
                    exchange = _Exchange(call, plan, runs, generation)
                    if streams:
                        await self._stream(exchange, stream)
                    else:
                        await self._whole(exchange, send)
            finally:
                context.num_completion_tokens = sum(run.num_tokens for run in runs)

    def _runs(self, plan: Plan) -> list[ChoiceStream]:
        stops = StopStrings(self._job.request.stops)
        return [
            ChoiceStream(
                choice,
                detokenizer=self._services.tokenizer.new_detokenizer(),
                scanner=stops.scanner(),
                metrics=self._services.metrics,
                every_token=self._return_token_ids or self._job.num_logprobs is not None,
            )
            for choice in plan.choices
        ]

    async def _whole(self, exchange: _Exchange, send: Send) -> None:
        answers = [Answer(index) for index in range(len(exchange.runs))]
        while (deltas := await exchange.generation.batch()) is not None:
            for delta in deltas:
                answers[delta.index].add(delta)
        choices = [
            self._with_tokens(self._job.answer_choice(answer), answer.token_ids, answer.logged)
            for answer in answers
        ]
        body = {**self._head, "choices": choices, "usage": self._usage(exchange)}
        data = to_json(body | self._prompt_token_ids(exchange.plan) | self._timeline(exchange))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ]
        await exchange.call.answered()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def _stream(self, exchange: _Exchange, stream: EventStream) -> None:
        with_usage = {"usage": None} if self._job.request.include_usage else {}
        extras: Mapping[str, Any] = with_usage | self._prompt_token_ids(exchange.plan)
        num_unfinished = len(exchange.runs)
        while (deltas := await exchange.generation.batch()) is not None:
            events = [] if deltas else [KEEP_ALIVE]
            for delta in deltas:
                num_unfinished -= delta.finish_reason is not None
                if num_unfinished == 0 and not with_usage:
                    extras = {**extras, **self._timeline(exchange)}
                events.append(event_after(self._encoded_head, self._chunk(delta, extras)))
                extras = with_usage
            await stream.write(b"".join(events))
        end = DONE
        if self._job.request.include_usage:
            last = {**self._head, "choices": [], "usage": self._usage(exchange)}
            end = event(last | self._timeline(exchange)) + DONE
        await exchange.call.answered()
        await stream.write(end, last=True)

    def _chunk(self, delta: Delta, extras: Mapping[str, Any]) -> dict[str, Any]:
        """What of it is not in every one's head."""
        choice = self._with_tokens(self._job.chunk_choice(delta), delta.token_ids, delta.logged)
        return {"choices": [choice], **extras}

    def _with_tokens(
        self, choice: dict[str, Any], token_ids: Sequence[int], logged: Sequence[LoggedToken]
    ) -> dict[str, Any]:
        """What was asked for of the tokens themselves, beside their text."""
        if self._job.num_logprobs is not None:
            choice |= {"logprobs": self._job.logprobs(logged, self._services.tokenizer.texts)}
        return choice | {"token_ids": list(token_ids)} if self._return_token_ids else choice

    def _prompt_token_ids(self, plan: Plan) -> dict[str, Any]:
        if not self._return_token_ids:
            return {}
        prompts = [list(prompt) for prompt in plan.prompts]
        return {"prompt_token_ids": prompts[0] if len(prompts) == 1 else prompts}

    def _timeline(self, exchange: _Exchange) -> dict[str, Any]:
        """The member that says where each choice's time went, if it was asked for."""
        entries = [
            {
                "index": run.choice.choice_index,
                **run.choice.timeline.report(),
                "num_prompt_tokens": len(run.choice.prompt_token_ids),
                "num_cached_tokens": run.num_cached_tokens,
            }
            for run in exchange.runs
            if run.choice.timeline is not None
        ]
        return {"baton": {"timeline": entries}} if entries else {}

    def _usage(self, exchange: _Exchange) -> dict[str, Any]:
        plan, runs, n = exchange.plan, exchange.runs, self._job.request.n
        # Of a prompt's choices at least one had to compute what was not cached before.
        num_cached = [
            min(run.num_cached_tokens for run in runs[index * n : (index + 1) * n])
            for index in range(len(plan.prompts))
        ]
        return usage(plan.prompts, num_cached, sum(run.num_tokens for run in runs))

    async def _fail(self, stream: EventStream, context: RequestContext, error: BatonError) -> None:
        """Ends a stream that has begun: an error event, and no sign of success."""
        context.outcome = error.code
        if isinstance(error, CancelledError):
            return
        try:
            # A client that reads nothing must not keep its failed request here.
            async with asyncio.timeout(self._services.config.gateway.sse_keepalive_s):
                await stream.write(event(error.body()), last=True)
        except TimeoutError:
            _log.info("request %s: its client does not read", context.request_id)
