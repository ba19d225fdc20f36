"""Streaming chat users for any server of OpenAI's chat API. Run from the repository's root:

    .venv/bin/locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000
    .venv/bin/locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 \\
        --headless --users 8 --spawn-rate 2 --run-time 60s --stop-timeout 30

- ChatUser asks short questions, several turns a conversation: the history grows.
- DocumentUser gives a long text first, each another one, then asks about it.

Both think between a turn and the next. What they say is a function of ``--seed``, the
user's number and the answers.
"""

from __future__ import annotations

import itertools
import logging
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gevent import GreenletExit
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import LocalRunner, MasterRunner

from benchmarks import prompts
from benchmarks.chat_client import ServedModel, ask, new_client, served_model
from benchmarks.chat_stream import ChatStream, RequestFailed
from benchmarks.conversation import Conversation
from benchmarks.figures import Objectives, record_of
from benchmarks.load_options import add_options
from benchmarks.load_report import render, write_json
from benchmarks.recorder import Recorder

_UNKNOWN_CONTEXT = 2048
"""In tokens; of a server that does not tell."""
_LONGEST_THOUGHT = 5.0
"""Times the mean."""


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser, **_: Any) -> None:
    add_options(parser)


class _Run:
    """What all users of this process share: options, recorder, what the server said."""

    recorder: Recorder
    options: Namespace
    model: ServedModel
    began_at: float
    part: int
    """Which of locust's workers this process is."""
    numbers: Iterator[int]
    num_asked: int
    num_over: int

    def begin(self, environment: Environment) -> None:
        """Raises StopTest, in a sentence, where there is nothing to measure."""
        assert environment.parsed_options is not None
        self.options = options = environment.parsed_options
        self.recorder.clear()
        self.numbers = itertools.count()
        self.num_asked = self.num_over = 0
        self.part = getattr(environment.runner, "worker_index", 0)
        self.began_at = time.perf_counter()
        if isinstance(environment.runner, MasterRunner):
            return
        if not environment.host:
            raise StopTest("no server is named; use --host URL")
        with new_client(environment.host, api_key=options.api_key, timeout_s=10.0) as client:
            try:
                self.model = served_model(client)
            except RequestFailed as failure:
                raise StopTest(f"cannot load {environment.host}: {failure}") from None
        needed = options.document_tokens + options.answer_tokens + 200
        if options.document_weight and needed > self.context:
            raise StopTest(
                f"documents of {options.document_tokens} tokens do not fit the context of "
                f"{self.context}; lower --document-tokens, or use --document-weight 0"
            )

    @property
    def enough(self) -> bool:
        """All the requests there should be have been made."""
        wanted: int = self.options.requests
        return 0 < wanted <= self.num_asked

    @property
    def over(self) -> bool:
        """And answered."""
        return self.enough and self.num_over >= self.num_asked

    @property
    def context(self) -> int:
        return int(self.options.context or self.model.max_model_len or _UNKNOWN_CONTEXT)

    @property
    def objectives(self) -> Objectives:
        o = self.options
        return Objectives(o.objective_ttft, o.objective_itl, o.objective_itl_percentile)


_run = _Run()


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    _run.recorder = Recorder(environment)
    options = environment.parsed_options
    assert options is not None
    ChatUser.weight, DocumentUser.weight = options.chat_weight, options.document_weight
    environment.user_classes[:] = [each for each in environment.user_classes if each.weight]


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    try:
        _run.begin(environment)
    except StopTest:
        environment.process_exit_code = 1
        raise


@events.test_stop.add_listener
def _end(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, LocalRunner):
        _report()


@events.quit.add_listener
def _end_of_all(**_: Any) -> None:
    """A master's: at ``test_stop`` its workers have not sent everything yet."""
    if isinstance(_run.recorder.environment.runner, MasterRunner):
        _report()


def _report() -> None:
    recorder, objectives = _run.recorder, _run.objectives
    if not recorder.records and not recorder.num_cut:
        return
    print("\n" + render(recorder.records, objectives, num_cut=recorder.num_cut) + "\n", flush=True)
    if file := _run.options.report_json:
        write_json(Path(file), recorder.records, objectives, num_cut=recorder.num_cut)


class _ChattingUser(User):
    """A person at a chat: asks, reads the answer as it comes, thinks, asks again."""

    abstract = True
    kind: ClassVar[str]

    def on_start(self) -> None:
        options = self.options = _run.options
        self.random = prompts.rng(options.seed, self.kind, _run.part, next(_run.numbers))
        self.client = new_client(
            self.environment.host or "",
            api_key=options.api_key,
            timeout_s=options.request_timeout,
        )
        self._asked_at = time.perf_counter()
        self._begin_conversation()

    def on_stop(self) -> None:
        self.client.close()

    def wait_time(self) -> float:
        """Seconds to the next question."""
        if self.options.pace > 0:
            return float(max(0.0, self._asked_at + self.options.pace - time.perf_counter()))
        thought = min(self.random.expovariate(1.0), _LONGEST_THOUGHT)
        return float(self.options.think_time * thought)

    @task
    def turn(self) -> None:
        """One question and its answer; a new conversation where this one is over."""
        if _run.enough:
            if _run.over and self.environment.runner is not None:
                self.environment.runner.quit()
            return
        _run.num_asked += 1
        full = self._conversation.num_turns >= self._num_turns
        if full or not self._ask():
            self._begin_conversation()
            self._ask()
        kind = self.kind if self._conversation.num_turns == 0 else "follow-up"
        self._asked_at = time.perf_counter()
        stream = ChatStream(self._asked_at)
        try:
            ask(self.client, self._body(), stream, timeout_s=self.options.request_timeout)
        except RequestFailed as failure:
            self._record(stream, kind, failure)
            self._begin_conversation()
        except GreenletExit:  # the run ends
            _run.recorder.num_cut += 1
            raise
        else:
            self._record(stream, kind)
            self._conversation.answered(
                stream.text,
                num_prompt_tokens=stream.num_prompt_tokens,
                num_tokens=stream.num_tokens,
            )

    def _record(self, stream: ChatStream, kind: str, failure: RequestFailed | None = None) -> None:
        now = time.perf_counter()
        _run.num_over += 1
        record = record_of(stream, kind, run_began_at=_run.began_at, now=now, failure=failure)
        _run.recorder.add(record, failure)

    def _body(self) -> dict[str, Any]:
        options = self.options
        body: dict[str, Any] = {
            "model": options.model or _run.model.name,
            "messages": self._conversation.messages,
            "max_tokens": options.answer_tokens,
            "temperature": options.temperature,
            "seed": self.random.getrandbits(31),
        }
        if options.fixed_length:
            body["ignore_eos"] = True
        if options.token_ids:
            body["return_token_ids"] = True
        return body

    def _begin_conversation(self) -> None:
        self._conversation = Conversation(
            context=_run.context, answer_tokens=self.options.answer_tokens
        )
        self._num_turns = self.random.randint(1, self.options.turns)

    def _ask(self) -> bool:
        """The next question into the conversation; False if it does not fit."""
        raise NotImplementedError


class ChatUser(_ChattingUser):
    """Short questions."""

    kind = "chat"

    def _ask(self) -> bool:
        begun = self._conversation.num_turns > 0
        question = prompts.follow_up if begun else prompts.opening
        return self._conversation.ask(question(self.random))


class DocumentUser(_ChattingUser):
    """A long document, then questions about it."""

    kind = "document"

    def _ask(self) -> bool:
        if self._conversation.num_turns:
            return self._conversation.ask(prompts.document_question(self.random))
        num_tokens = self.options.document_tokens
        text = prompts.document_opening(self.random, num_tokens)
        return self._conversation.ask(text, num_tokens + 24)
