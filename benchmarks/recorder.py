"""Between the requests of a locust process and all who hear of them.

locust's own table, web UI and CSV files get them as request types ``E2E``, ``TTFT``,
``TPOT`` and ``ITL``; failures only as ``E2E``, each once. The exact records are kept
here, and locust's workers send theirs to the master.
"""

from __future__ import annotations

from typing import Any

from locust.env import Environment

from benchmarks.chat_stream import RequestFailed
from benchmarks.figures import Record


class Recorder:
    """One per locust process."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.clear()
        environment.events.report_to_master.add_listener(self._report_to_master)
        environment.events.worker_report.add_listener(self._worker_report)
        environment.events.reset_stats.add_listener(self.clear)

    def clear(self, **_: Any) -> None:
        self.records: list[Record] = []
        self.num_cut = 0
        self._num_sent = 0
        self._num_cut_sent = 0

    def add(self, record: Record, failure: RequestFailed | None = None) -> None:
        self.records.append(record)
        self._fire("E2E", record, record.e2e_s, failure)
        if failure is not None or record.ttft_s is None:
            return
        self._fire("TTFT", record, record.ttft_s)
        for gap_s in record.gaps_s:
            self._fire("ITL", record, gap_s)
        if record.tpot_s is not None:
            self._fire("TPOT", record, record.tpot_s)

    def _fire(
        self, kind: str, record: Record, seconds: float, failure: RequestFailed | None = None
    ) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=record.kind,
            response_time=1000 * seconds,
            response_length=record.num_tokens if kind == "E2E" else 0,
            exception=failure,
            context={},
        )

    def _report_to_master(self, data: dict[str, Any], **_: Any) -> None:
        new, self._num_sent = self.records[self._num_sent :], len(self.records)
        data["baton_records"] = [record.to_json() for record in new]
        data["baton_num_cut"] = self.num_cut - self._num_cut_sent
        self._num_cut_sent = self.num_cut

    def _worker_report(self, data: dict[str, Any], **_: Any) -> None:
        self.records += map(Record.from_json, data.get("baton_records", ()))
        self.num_cut += data.get("baton_num_cut", 0)
