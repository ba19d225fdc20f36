"""`baton chat`: a conversation on the terminal with a running server."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from baton.errors import BatonError, InvalidRequestError, UnavailableError
from cluster.chat_stream import Answer, Message, stream_chat
from cluster.server_client import authorization, fetch_json

_GREETING = "[dim]/exit or Ctrl-D leaves, /new begins anew, Ctrl-C stops an answer[/dim]"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the command line said."""

    url: str
    model: str | None
    temperature: float | None
    max_tokens: int | None
    system: str | None


def _first_model(url: str) -> str:
    """Raises UnavailableError when the server has none, or is none."""
    page = fetch_json(url, "/v1/models")
    try:
        return str(page["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise UnavailableError(f"the server at {url} offers no model") from None


def summary(answer: Answer) -> str:
    """TTFT, rate and size of an answer, as far as they are known."""
    parts = []
    if answer.ttft_s is not None:
        parts.append(f"TTFT {answer.ttft_s * 1000:.0f} ms")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.num_tokens is not None:
        parts.append(f"{answer.num_tokens} tokens")
    if cached := (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
        parts.append(f"{cached} of {answer.usage['prompt_tokens']} prompt tokens cached")
    if answer.finish_reason == "length":
        parts.append("cut off by max_tokens")
    return " · ".join(parts)


class Chat:
    """One conversation. A question that was not answered to its end is forgotten."""

    def __init__(self, client: httpx.Client, options: ChatOptions, model: str) -> None:
        self._client = client
        self._options = options
        self._model = model
        self._out = Console(highlight=False)
        self._aside = Console(stderr=True, highlight=False)
        self._messages: list[Message] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets everything but the system's message."""
        system = self._options.system
        _check_text(system or "")
        self._messages = [{"role": "system", "content": system}] if system else []

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": self._messages}
        if self._options.temperature is not None:
            body["temperature"] = self._options.temperature
        if self._options.max_tokens is not None:
            body["max_completion_tokens"] = self._options.max_tokens
        return body

    def ask(self, question: str) -> None:
        """Prints the answer as it comes. Raises UnavailableError, KeyboardInterrupt, and
        InvalidRequestError for what is no text."""
        _check_text(question)
        self._messages.append({"role": "user", "content": question})
        answer = Answer(began=time.monotonic())
        done = False
        try:
            with closing(stream_chat(self._client, self._body(), answer)) as pieces:
                for text in pieces:
                    self._out.print(text, end="", markup=False, soft_wrap=True)
            done = True
        finally:
            if answer.text:
                self._out.print()
            if not done:
                self._messages.pop()
        self._messages.append({"role": "assistant", "content": answer.text})
        self._aside.print(f"[dim]{escape(summary(answer))}[/dim]")

    def converse(self) -> None:
        """Questions from standard input until it ends."""
        terminal = self._out.is_terminal
        if terminal:
            self._aside.print(f"[bold]{escape(self._model)}[/bold]  {_GREETING}")
        while True:
            try:
                line = input("\n> " if terminal else "").strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/new":
                self.begin_anew()
            elif line:
                self._ask_or_say_why(line)

    def _ask_or_say_why(self, line: str) -> None:
        try:
            self.ask(line)
        except KeyboardInterrupt:
            self._aside.print("[dim]stopped[/dim]")
        except BatonError as error:
            self._aside.print(f"[red]baton:[/red] {escape(error.message)}")


def _check_text(text: str) -> None:
    """A terminal can pass on bytes that are no UTF-8; Python keeps them as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("that is not UTF-8 text; write it again") from None


def chat(options: ChatOptions, message: str | None) -> None:
    """Answers ``message`` and returns, or converses. Raises UnavailableError."""
    if message is None:
        _enable_line_editing()
    model = options.model or _first_model(options.url)
    # No bound on silence: the server sends keep-alive comments and has deadlines.
    timeout = httpx.Timeout(10.0, read=None)
    with httpx.Client(
        base_url=options.url, timeout=timeout, trust_env=False, headers=authorization()
    ) as client:
        conversation = Chat(client, options, model)
        if message is not None:
            conversation.ask(message)
            return
        try:
            conversation.converse()
        except KeyboardInterrupt:
            return


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  (importing it is what enables it)
    except ImportError:
        return
