"""What the HTTP edge asks of the orchestrator."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from router.request import ChoiceOutput, ChoiceRequest
from router.status import ClusterStatus


class Orchestrator(Protocol):
    """Takes choices to their ends on the workers."""

    def generate(self, choice: ChoiceRequest) -> AsyncGenerator[ChoiceOutput, None]:
        """The choice's outputs; the last has a finish reason.

        ``aclose()`` of the generator, or cancelling the task that waits on it,
        cancels the choice on all workers. Raises a BatonError on failure.
        """
        ...

    def status(self) -> ClusterStatus:
        """The cluster as last seen; does not wait."""
        ...

    def worker_metrics(self) -> list[bytes]:
        """Each live worker's last page in the Prometheus text format; to be called before
        this gateway's own page is made, whose gauges it brings up to date."""
        ...
