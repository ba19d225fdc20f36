"""Health, readiness, models, status, the merged metrics page, the API description."""

from __future__ import annotations

import json

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.fake_gateway import MODEL, Gateway, error_of, real_checkpoint, worker_status

from baton.telemetry import WorkerMetrics
from router.gateway.metrics_page import merged_page
from router.status import ClusterStatus


def worker_page(worker_id: str, free: int) -> bytes:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, worker_id=worker_id, role="decode")
    metrics.kv_blocks["free"].set(free)
    metrics.prompt_tokens["received"].inc(free)
    metrics.step_seconds.observe(0.02)
    return generate_latest(registry)


def series(page: str) -> dict[tuple[str, str], float]:
    """Value by name and worker; fails where a family or a series stands twice."""
    lines = page.splitlines()
    for kind in ("# HELP", "# TYPE"):
        names = [line.split()[2] for line in lines if line.startswith(kind)]
        assert len(names) == len(set(names))
    keys = [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]
    assert len(keys) == len(set(keys))
    return {
        (
            sample.name,
            sample.labels.get("worker", "") + sample.labels.get("state", ""),
        ): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "le" not in sample.labels
    }


async def test_health_says_alive_even_without_workers() -> None:
    gateway = Gateway()
    gateway.orchestrator.cluster = ClusterStatus((), False, ("No decode worker is ready.",))
    assert (await gateway.get("/health")).status_code == 200


async def test_ready_says_what_is_missing() -> None:
    gateway = Gateway()
    assert (await gateway.get("/ready")).status_code == 200
    gateway.orchestrator.cluster = ClusterStatus((), True, ("No decode worker is ready.",))
    response = await gateway.get("/ready")
    assert response.status_code == 503
    assert "No decode worker is ready." in error_of(response)["message"]


async def test_ready_says_what_makes_it_serve_worse() -> None:
    gateway = Gateway()
    degraded = ("The registry (Redis) does not answer.",)
    gateway.orchestrator.cluster = ClusterStatus((), False, degraded=degraded)
    response = await gateway.get("/ready")
    assert response.status_code == 200
    assert response.json()["degraded"] == list(degraded)


async def test_models_are_listed_even_when_no_worker_is_up() -> None:
    gateway = Gateway()
    gateway.orchestrator.cluster = ClusterStatus((), False, ("x",))
    (model,) = (await gateway.get("/v1/models")).json()["data"]
    assert model["id"] == MODEL
    assert model["object"] == "model"
    assert model["max_model_len"] == real_checkpoint().config.max_position
    assert (await gateway.get(f"/v1/models/{MODEL}")).json() == model


async def test_unknown_model_has_its_error_also_with_slashes() -> None:
    response = await Gateway().get("/v1/models/org/name")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_status_shows_every_worker() -> None:
    gateway = Gateway()
    workers = (worker_status("prefill-0", role="prefill"), worker_status(num_free_blocks=7))
    gateway.orchestrator.cluster = ClusterStatus(workers, registry_up=False)
    status = (await gateway.get("/status")).json()
    assert status["model"] == MODEL
    assert status["ready"] is True
    assert status["registry_up"] is False
    assert [worker["worker_id"] for worker in status["workers"]] == ["prefill-0", "decode-0"]
    assert status["workers"][1]["num_free_blocks"] == 7


async def test_metrics_page_has_the_gateways_and_every_workers_series_once() -> None:
    gateway = Gateway()
    await gateway.chat()
    gateway.orchestrator.pages = [worker_page("decode-0", 5), worker_page("decode-1", 7)]
    response = await gateway.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = series(response.text)
    assert found["baton_requests_total", ""] == 1
    assert found["baton_kv_blocks", "decode-0free"] == 5
    assert found["baton_kv_blocks", "decode-1free"] == 7
    assert found["baton_engine_step_seconds_count", "decode-1"] == 1
    assert "# TYPE baton_kv_blocks gauge" in response.text
    assert "# TYPE baton_prompt_tokens_total counter" in response.text


async def test_series_of_a_worker_that_is_gone_are_gone() -> None:
    gateway = Gateway()
    gateway.orchestrator.pages = [worker_page("decode-0", 5)]
    assert "decode-0" in (await gateway.get("/metrics")).text
    gateway.orchestrator.pages = []
    assert "decode-0" not in (await gateway.get("/metrics")).text


@pytest.mark.parametrize("page", [b"\xff\xfe", b"no page at all {", b"baton_x 1 2 3 four\n"])
def test_malformed_page_is_left_out_and_logged(page: bytes, caplog) -> None:
    merged = merged_page(CollectorRegistry(), [page, worker_page("decode-1", 7)]).decode()
    assert series(merged)["baton_kv_blocks", "decode-1free"] == 7
    assert "baton_x" not in merged
    assert "malformed" in caplog.text


def test_family_of_another_type_is_left_out_and_logged(caplog) -> None:
    pages = [b"# TYPE x gauge\nx 1\n", b"# TYPE x summary\nx_count 2\n"]
    assert b"x_count" not in merged_page(CollectorRegistry(), pages)
    assert "metric x is a gauge" in caplog.text


def test_same_series_on_two_pages_stands_once() -> None:
    merged = merged_page(CollectorRegistry(), [b"# TYPE x gauge\nx 1\n"] * 2).decode()
    assert series(merged) == {("x", ""): 1}


async def test_api_description_resolves_all_its_references() -> None:
    text = (await Gateway().get("/openapi.json")).text
    description = json.loads(text)

    def references(value):
        if isinstance(value, dict):
            for name, item in value.items():
                if name == "$ref":
                    yield item
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    found = set(references(description))
    assert "#/components/schemas/ChatRequest" in found
    for reference in found:
        node = description
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_pages_that_load_scripts_from_elsewhere_are_absent(path: str) -> None:
    assert (await Gateway().get(path)).status_code == 404
