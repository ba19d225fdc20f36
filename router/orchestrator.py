"""Takes choices to their ends on the workers: admission, then one run for each."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncGenerator, Callable

from baton.config import BatonConfig
from baton.faults import Faults
from baton.telemetry import GatewayMetrics
from baton.timeline import Timeline
from router.admission import Admission
from router.choice_run import ChoiceRun, Serving
from router.request import ChoiceOutput, ChoiceRequest
from router.routing.input_hashes import BlockNames
from router.routing.policy import PeerLoad, RoutingPolicy
from router.status import ClusterStatus
from router.workers.pool import WorkerPool
from router.workers.view import cluster_status


class Orchestrator:
    """Owns every choice from its submission to its end. Lives on one event loop."""

    def __init__(
        self,
        *,
        config: BatonConfig,
        pool: WorkerPool,
        policy: RoutingPolicy,
        metrics: GatewayMetrics,
        faults: Faults,
        registry_up: Callable[[], bool],
        rng: random.Random,
        names: BlockNames | None = None,
        prefill_wanted: Callable[[], bool | None] = lambda: None,
        gateways: Callable[[], tuple[str, ...]] = tuple,
        peers: PeerLoad | None = None,
        peers_up: Callable[[], bool] = lambda: True,
    ) -> None:
        """What the status shows beside the workers: ``registry_up``; whether prefill workers
        are wished for (None: as configured); which gateways live; ``peers``' load."""
        self._config = config
        self._pool = pool
        self._faults = faults
        self._metrics = metrics
        self._registry_up = registry_up
        self._prefill_wanted = prefill_wanted
        self._gateways = gateways
        self._peers = peers
        self._peers_up = peers_up
        self._admission = Admission(
            max_in_flight=config.gateway.max_in_flight,
            max_queued=config.gateway.max_queued,
            metrics=metrics,
        )
        self._serving = Serving(
            pool=pool,
            policy=policy,
            metrics=metrics,
            stream_ids=itertools.count(1),
            rng=rng,
            names=names,
            max_attempts=config.gateway.max_attempts,
            wait_for_worker_s=config.session.silence_s,
            wait_for_recovery_s=config.gateway.recovery_s,
            prefill_pulls=config.routing.prefill_pulls,
        )

    async def generate(self, choice: ChoiceRequest) -> AsyncGenerator[ChoiceOutput, None]:
        """The choice's outputs; the last has a finish reason.

        Closing the generator, or cancelling the task that waits on it, cancels the
        choice on all workers. Raises a BatonError on failure.
        """
        timeline = choice.timeline or Timeline()
        timeline.submitted()
        # The choices of a request wait in their order: while the first does, none has begun.
        place = self._admission.admitted(
            choice.deadline, choice.priority, keeps_place=choice.choice_index > 0
        )
        async with place:
            timeline.admitted()
            run = ChoiceRun(choice, self._serving, timeline)
            try:
                await self._faults.wait("gateway.admitted")
                while True:
                    output = await run.next()
                    yield output
                    if output.finish_reason is not None:
                        return
            finally:
                run.close()
                if (exposed_s := timeline.handoff_exposed_s) is not None:
                    self._metrics.handoff_exposed.observe(exposed_s)

    def status(self) -> ClusterStatus:
        """The cluster as last seen; does not wait."""
        wanted = self._prefill_wanted()
        return cluster_status(
            self._pool,
            registry_up=self._registry_up(),
            prefill_wanted=self._config.num_replicas("prefill") > 0 if wanted is None else wanted,
            gateways=self._gateways(),
            peers=self._peers,
            peers_up=self._peers_up(),
        )

    def worker_metrics(self) -> list[bytes]:
        """The last page of every worker with a live Session, as Prometheus text. Brings
        this gateway's own gauges that are counted on demand up to date."""
        self._pool.count_indexed_blocks()
        sessions = [link.session for link in self._pool.links]
        reports = [session.report for session in sessions if session is not None]
        return [report.metrics for report in reports if report is not None]
