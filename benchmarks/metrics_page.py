"""A metrics page in Prometheus' text format, parsed."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


class MetricsPage:
    """What ``GET /metrics`` said at one moment."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of ``name`` whose labels include ``labels``."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
