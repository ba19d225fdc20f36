"""One Prometheus page of several processes' pages.

https://prometheus.io/docs/instrumenting/exposition_formats/
Every family stands once, with its HELP and TYPE, and every series once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_log = logging.getLogger(__name__)


class MergedPages(Collector):
    """The families of all pages, in the order in which they first appear."""

    def __init__(self, pages: Iterable[bytes]) -> None:
        self._families: dict[str, Metric] = {}
        self._seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
        for page in pages:
            self._add(page)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()

    def _add(self, page: bytes) -> None:
        try:
            families = list(text_string_to_metric_families(page.decode()))
        except Exception as error:
            # The parser raises what it stumbles over. One sick worker hides no other.
            _log.warning("a worker's metrics page is malformed and left out: %s", error)
            return
        for family in families:
            known = self._families.get(family.name)
            if known is None:
                known = Metric(family.name, family.documentation, family.type)
                self._families[family.name] = known
            if known.type == family.type:
                self._add_samples(known, family)
            else:
                _log.warning(
                    "metric %s is a %s on one page and a %s on another; left out",
                    family.name, known.type, family.type,
                )  # fmt: skip

    def _add_samples(self, known: Metric, family: Metric) -> None:
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            if series not in self._seen:
                self._seen.add(series)
                known.samples.append(sample)


def merged_page(registry: CollectorRegistry, worker_pages: Sequence[bytes]) -> bytes:
    """This process's page and the workers', as one valid page. Takes milliseconds
    for each worker, so it belongs in a thread."""
    return generate_latest(MergedPages([generate_latest(registry), *worker_pages]))
