"""What the operators' pages are given."""

from __future__ import annotations

import pytest

from baton.v1 import session_pb2 as pb
from router.routing.policy import PeerShare
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


@pytest.mark.parametrize(("configured", "wanted"), [(1, False), (0, True), (0, None), (1, None)])
async def test_prefill_workers_are_missed_where_they_are_wished_for(
    configured: int, wanted: bool | None
) -> None:
    """Wishes go before the configuration, as after ``baton scale prefill=0`` or from 0 to 2."""
    pools = {"prefill": {"replicas": configured}, "decode": {}}
    async with fake_cluster(pools=pools) as cluster:
        await cluster.add("decode-0", "decode")
        cluster.prefill_wanted = wanted
        missed = wanted if wanted is not None else configured > 0
        degraded = cluster.orchestrator.status().degraded
        assert degraded == (("No prefill worker is ready.",) if missed else ())


async def test_load_of_peers_shows_with_every_worker_and_their_silence_degrades() -> None:
    async with fake_cluster(pools={"prefill": {"replicas": 0}, "decode": {}}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        worker.reporting = False
        cluster.peers.shares[worker.epoch] = PeerShare(100, 7, 2)
        cluster.gateways = ("gateway-0", "gateway-1")
        status = cluster.orchestrator.status()
        (shown,) = status.workers
        assert (shown.num_peer_tokens, shown.num_peer_blocks) == (100, 7)
        assert shown.num_peer_sequences == 2
        assert status.gateways == ("gateway-0", "gateway-1")
        assert status.degraded == ()
        cluster.peers.up = False
        status = cluster.orchestrator.status()
        assert "not shared" in status.degraded[0]
        assert status.ready


async def test_size_of_the_kv_index_and_its_events_are_counted() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        snapshot = pb.CacheEvents(sequence=1, snapshot=True, added=bytes(32))
        worker.send(pb.WorkerMessage(cache_events=snapshot))
        await wait_until(lambda: cluster.sample("baton_kv_index_events_total") == 1)
        cluster.orchestrator.worker_metrics()
        assert cluster.sample("baton_kv_index_blocks", role="decode") == 1  # twice the same hash
        assert cluster.sample("baton_kv_index_blocks", role="prefill") == 0
        assert cluster.sample("baton_kv_index_snapshot_requests_total") == 0
        worker.send(pb.WorkerMessage(cache_events=pb.CacheEvents(sequence=3)))
        await wait_until(lambda: worker.num_received("cache_snapshot_request") == 1)
        assert cluster.sample("baton_kv_index_snapshot_requests_total") == 1
