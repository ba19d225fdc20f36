"""One streamed chat answer: what came when, and whether that was a whole answer.

A token's time is the time at which the read that brought it returned. Tokens of one
read came at once: the first of them has the whole gap since the token before, the
others none. Sharing the gap out among them would hide the pause that a reader sees.

An answer is whole only with a finish reason of success *and* ``[DONE]``; everything
else raises RequestFailed, however many tokens came before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from benchmarks.sse import SseEvent, SseReader

_WHOLE = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter"})
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
_LONGEST_DETAIL = 200

Kind = Literal["connect", "status", "no stream", "error event", "malformed", "cut", "miscount"]


class RequestFailed(Exception):
    """A request that was not answered whole: ``kind`` is for counting, the rest for people."""

    def __init__(self, kind: Kind | Literal["timeout"], detail: str) -> None:
        detail = " ".join(detail.split())[:_LONGEST_DETAIL]
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class ChatStream:
    """Made when the request begins. Times are seconds of one clock."""

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.ttft_s: float | None = None
        self.gaps_s: list[float] = []
        self.e2e_s: float | None = None
        """Set at the end of a whole answer."""
        self.text = ""
        self.finish_reason: str | None = None
        self.num_prompt_tokens: int | None = None
        self.num_cached_tokens: int | None = None
        self._num_reported: int | None = None
        self._num_ids: int | None = None
        self._num_events = 0
        self._last_at = began_at
        self._done = False
        self._reader = SseReader()

    @property
    def num_tokens(self) -> int:
        """As the server's usage says; else its token ids; else events with text."""
        for number in (self._num_reported, self._num_ids):
            if number is not None:
                return number
        return self._num_events

    @property
    def counted_by(self) -> Literal["usage", "token ids", "events"]:
        if self._num_reported is not None:
            return "usage"
        return "events" if self._num_ids is None else "token ids"

    def push(self, data: bytes, now: float) -> None:
        """What one read brought. Raises RequestFailed."""
        try:
            events = self._reader.push(data)
        except UnicodeDecodeError as error:
            raise RequestFailed("malformed", f"an event is no UTF-8: {error.reason}") from None
        for event in events:
            self._take(event, now)

    def end(self, now: float) -> None:
        """The response is over. Raises RequestFailed unless the answer is whole."""
        if self.finish_reason is None or not self._done:
            missing = "[DONE]" if self.finish_reason else "finish_reason"
            raise RequestFailed("cut", f"the stream ended without {missing}")
        if self.finish_reason not in _WHOLE:
            raise RequestFailed("cut", f"the answer ended with {self.finish_reason!r}")
        if None not in (self._num_ids, self._num_reported) and self._num_ids != self._num_reported:
            detail = "the token ids are not as many as usage.completion_tokens says"
            raise RequestFailed("miscount", detail)
        self.e2e_s = now - self.began_at

    # ------------------------------------------------------------------ events

    def _take(self, event: SseEvent, now: float) -> None:
        if event.data == "[DONE]":
            self._done = True
            return
        try:
            chunk = json.loads(event.data)
        except ValueError:
            raise RequestFailed("malformed", "an event is no JSON") from None
        if not isinstance(chunk, dict):
            raise RequestFailed("malformed", "an event is no JSON object")
        if "error" in chunk or event.type == "error":
            raise RequestFailed("error event", error_sentence(chunk))
        try:
            self._chunk(chunk, now)
        except (AttributeError, KeyError, TypeError, IndexError):
            raise RequestFailed("malformed", "an event is no chat completion chunk") from None

    def _chunk(self, chunk: Mapping[str, Any], now: float) -> None:
        if usage := chunk.get("usage"):
            self._num_reported = int(usage["completion_tokens"])
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            details = usage.get("prompt_tokens_details") or {}
            self.num_cached_tokens = details.get("cached_tokens")
        for choice in chunk["choices"][:1]:
            delta = choice.get("delta") or {}
            text = "".join(delta.get(name) or "" for name in _TEXTS)
            self.text += delta.get("content") or ""
            ids = choice.get("token_ids")
            if ids is not None:
                self._num_ids = (self._num_ids or 0) + len(ids)
            self._num_events += bool(text)
            self._tokens(bool(text) if ids is None else len(ids), now)
            if reason := choice.get("finish_reason"):
                self.finish_reason = str(reason)
                if self.ttft_s is None:  # an answer without any text
                    self.ttft_s = now - self.began_at

    def _tokens(self, num: int, now: float) -> None:
        for _ in range(num):
            if self.ttft_s is None:
                self.ttft_s = now - self.began_at
            else:
                self.gaps_s.append(now - self._last_at)
            self._last_at = now


def error_sentence(body: Any) -> str:
    """Code and message of an error in OpenAI's shape, or what there is instead."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)
    return f"{error.get('code') or error.get('type')}: {error.get('message')}"
