"""What the operators' pages are given."""

from __future__ import annotations

from baton.v1 import session_pb2 as pb
from tests.support.fake_cluster import fake_cluster, wait_until


async def test_empty_cluster_says_what_is_missing() -> None:
    async with fake_cluster() as cluster:
        status = cluster.orchestrator.status()
        assert not status.ready
        assert "No decode worker is ready." in status.missing
        assert status.max_model_len is None
        assert cluster.orchestrator.worker_metrics() == []


async def test_missing_prefill_pool_degrades_but_is_ready() -> None:
    async with fake_cluster() as cluster:
        await cluster.add("decode-0", "decode")
        status = cluster.orchestrator.status()
        assert status.ready
        assert "No prefill worker" in status.degraded[0]
        await cluster.add("prefill-0", "prefill")
        assert cluster.orchestrator.status().degraded == ()


async def test_colocated_serving_misses_no_prefill_worker() -> None:
    async with fake_cluster(pools={"prefill": {"replicas": 0}, "decode": {}}) as cluster:
        await cluster.add("decode-0", "decode")
        assert cluster.orchestrator.status().degraded == ()


async def test_reports_show_until_their_worker_is_lost() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        worker.report = pb.Report(
            num_running=2,
            num_waiting=1,
            blocks=pb.BlockCounts(free=90, cached=4, referenced=5, quarantined=1),
            metrics=b"# a page\n",
        )
        await wait_until(lambda: cluster.orchestrator.worker_metrics() == [b"# a page\n"])
        (shown,) = cluster.orchestrator.status().workers
        assert (shown.worker_id, shown.role, shown.epoch) == (
            "decode-0",
            "decode",
            worker.epoch.hex(),
        )
        assert (shown.num_running, shown.num_waiting) == (2, 1)
        assert (
            shown.num_free_blocks,
            shown.num_cached_blocks,
            shown.num_referenced_blocks,
            shown.num_quarantined_blocks,
        ) == (90, 4, 5, 1)
        assert shown.last_report_age_s is not None
        assert shown.ready
        await worker.stop()
        await wait_until(lambda: not cluster.orchestrator.status().ready)
        (shown,) = cluster.orchestrator.status().workers
        assert (shown.ready, shown.num_running, shown.last_report_age_s) == (False, 0, None)
        assert cluster.orchestrator.worker_metrics() == []
