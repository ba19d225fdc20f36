"""A locustfile that replays a plan: each request at its moment, however slow the answers are.

    python -m locust -f benchmarks/open_loop.py --headless --only-summary \\
        --host URL --plan plan.json --records records.json

``benchmarks.goodput`` writes the plan and reads the records. One locust user starts a
greenlet for each arrival; requests, clock and figures are those of locustfile.py.
"""

from __future__ import annotations

import json
import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gevent
from locust import User, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from benchmarks.arrivals import Arrival, Phase, Plan
from benchmarks.chat_client import ask, new_client, served_model
from benchmarks.chat_stream import ChatStream, RequestFailed
from benchmarks.figures import Record, record_of
from benchmarks.prompts import Message
from benchmarks.recorder import Recorder

_LEAD_S = 0.2
"""Between the decision to begin a phase and its first moment."""
_SETTLE_S = 0.5
"""After a phase: the server's time to notice who has left."""
_WARM_UP_S = 60.0


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser, **_: Any) -> None:
    parser.add_argument("--plan", required=True, metavar="FILE", help="Of benchmarks.arrivals.")
    parser.add_argument("--records", required=True, metavar="FILE", help="Where results go.")


class ReplayUser(User):
    """The one who sends everything; locust is asked for no more of it."""

    fixed_count = 1
    wait_time = constant(0)

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        assert environment.parsed_options is not None
        self._options: Namespace = environment.parsed_options
        self._recorder = Recorder(environment)
        logging.getLogger("httpx").setLevel(logging.WARNING)

    @task
    def replay(self) -> None:
        """The whole plan, then the end of the run."""
        self._plan = Plan.read(Path(self._options.plan))
        assert self.environment.runner is not None
        try:
            with new_client(self.environment.host or "", timeout_s=_WARM_UP_S) as self._client:
                self._model = served_model(self._client).name
                for messages in self._plan.warm_up:
                    body = self._body(messages)
                    stream = ChatStream(time.perf_counter())
                    ask(self._client, body, stream, timeout_s=_WARM_UP_S)
                results = [self._phase(phase) for phase in self._plan.phases]
            Path(self._options.records).write_text(json.dumps({"phases": results}))
        except RequestFailed as failure:
            logging.error("the load could not begin: %s", failure)
            self.environment.process_exit_code = 3
        self.environment.runner.quit()

    def _phase(self, phase: Phase) -> dict[str, Any]:
        bodies = [self._body(arrival.messages) for arrival in phase.arrivals]
        cpu_s, begins_at = time.process_time(), time.perf_counter() + _LEAD_S
        jobs = []
        for arrival, body in zip(phase.arrivals, bodies, strict=True):
            gevent.sleep(max(0.0, begins_at + arrival.at_s - time.perf_counter()))
            jobs.append(gevent.spawn(self._request, arrival, body, begins_at))
        gevent.joinall(jobs, raise_error=True)
        records: list[Record] = [job.value for job in jobs]
        duration_s = time.perf_counter() - begins_at
        gevent.sleep(_SETTLE_S)
        return {
            "rate_per_s": phase.rate_per_s,
            "window_s": phase.window_s,
            "duration_s": duration_s,
            "client_cpu_s": time.process_time() - cpu_s,
            "records": [record.to_json() for record in records],
        }

    def _request(self, arrival: Arrival, body: dict[str, Any], begins_at: float) -> Record:
        """The time counts from the arrival's moment, not from when it was sent."""
        due_at, bound_s = begins_at + arrival.at_s, self._plan.load.bound_s
        stream = ChatStream(due_at)
        late_s = time.perf_counter() - due_at
        failure, overdue = None, True
        with gevent.Timeout(max(0.0, bound_s - late_s), exception=False):
            try:
                ask(self._client, body, stream, timeout_s=2 * bound_s)
            except RequestFailed as error:
                failure = error
            overdue = False
        record = record_of(
            stream,
            arrival.kind,
            run_began_at=begins_at,
            now=time.perf_counter(),
            failure=failure,
            overdue=overdue,
            late_s=late_s,
        )
        self._recorder.add(record, failure)
        return record

    def _body(self, messages: list[Message]) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._plan.load.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
