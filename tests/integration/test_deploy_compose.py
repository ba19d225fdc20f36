"""deploy/compose.yaml: what it says is right, and what it runs serves a chat on loopback."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
import yaml
from support.compose import Service, read_services
from support.processes import Launch, Processes, base_environment, processes
from support.server import Page

import baton.worker.process
import router.main
from baton.config import BatonConfig, load_config
from cluster.redis_server import find_redis_server

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "compose.yaml"
SECRETS = {"BATON_SECRET": "s" * 64, "REDIS_PASSWORD": "p" * 64}
OURS = ("gateway", "prefill", "decode")
HEALTHY_S = 60.0


@pytest.fixture
def services() -> dict[str, Service]:
    return read_services(FILE, SECRETS)


def parsed(service: Service) -> argparse.Namespace:
    """Its command as the product reads it; SystemExit for one that it refuses."""
    python, dash, module, *arguments = service.arguments
    assert (python, dash) == ("python", "-m")
    if module == "router.main":
        return router.main._parser().parse_args(arguments)
    role = module.removesuffix("_workers.main")
    assert role in ("prefill", "decode"), module
    return baton.worker.process._parser(role).parse_args(arguments)


def configuration(service: Service, tmp_path: Path) -> BatonConfig:
    file = tmp_path / "baton.yaml"
    file.write_text(service.files[str(parsed(service).config)])
    return load_config(file)


@pytest.mark.parametrize("name", OURS)
def test_service_runs_a_command_that_the_product_takes(
    services: dict[str, Service], tmp_path: Path, name: str
) -> None:
    config = configuration(services[name], tmp_path)
    if name != "gateway":
        arguments = parsed(services[name])
        assert config.pools[arguments.pool].role == name
        assert arguments.worker_id.startswith(f"{arguments.pool}-")


def test_images_are_those_of_the_dockerfiles_in_this_version(services: dict[str, Service]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in OURS:
        definition = services[name].definition
        assert services[name].image.partition(":")[2].startswith(version)
        text = (ROOT / definition["build"]["dockerfile"]).read_text()
        assert f"-t {services[name].image} ." in text
        assert definition["build"]["args"] == {"INSTALL_OPTIONS": "--embedded-model"}
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-alpine", services["redis"].image)


def test_secrets_are_asked_for_and_have_no_default() -> None:
    for missing in SECRETS:
        given = {name: value for name, value in SECRETS.items() if name != missing}
        with pytest.raises(KeyError, match=f"{missing}: write it to deploy/.env"):
            read_services(FILE, given)


def test_all_share_the_secret_and_the_redis(services: dict[str, Service]) -> None:
    for name in OURS:
        environment = services[name].environment
        assert environment["BATON_SECRET"] == SECRETS["BATON_SECRET"]
        assert environment["REDIS_URL"] == f"redis://:{SECRETS['REDIS_PASSWORD']}@redis:6379/0"
    (settings,) = services["redis"].files.values()
    assert f"requirepass {SECRETS['REDIS_PASSWORD']}\n" in settings


def test_every_setting_in_an_environment_is_one_that_the_product_reads(
    services: dict[str, Service],
) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name in OURS:
        for variable in services[name].environment:
            assert not variable.startswith("BATON_") or f"`{variable}`" in page, variable


def test_a_worker_is_told_to_others_by_the_name_of_its_container(
    services: dict[str, Service], tmp_path: Path
) -> None:
    for name in ("prefill", "decode"):
        assert services[name].environment["BATON_ADVERTISE_HOST"] == name
        config = configuration(services[name], tmp_path)
        assert config.worker.host == "0.0.0.0"
        assert f":{config.worker.metrics_port}/" in services[name].healthcheck[-1]


def test_containers_that_share_no_memory_hand_over_by_the_network(
    services: dict[str, Service], tmp_path: Path
) -> None:
    assert configuration(services["decode"], tmp_path).kv_transfer.transport == "gloo"
    assert not any("ipc" in service.definition for service in services.values())


def test_only_the_gateway_is_published_and_on_loopback_alone(
    services: dict[str, Service], tmp_path: Path
) -> None:
    published = {n: s.definition["ports"] for n, s in services.items() if "ports" in s.definition}
    port = configuration(services["gateway"], tmp_path).gateway.port
    assert published == {"gateway": [f"127.0.0.1:8000:{port}"]}
    inside = [name for name in services if services[name].definition["networks"] == ["inside"]]
    assert sorted(inside) == ["decode", "prefill", "redis"]


def test_containers_get_the_time_that_draining_takes(
    services: dict[str, Service], tmp_path: Path
) -> None:
    config = configuration(services["gateway"], tmp_path)
    assert services["gateway"].stop_s >= config.gateway.drain_s + 5
    for name in ("prefill", "decode"):
        assert services[name].stop_s >= config.for_pool(name).worker.drain_s + 10


# ------------------------------------------------------------------ executed


class Compose:
    """The services as processes. Each has a loopback address of its own in place of a
    container's; nothing else of what the file says is changed."""

    def __init__(self, services: Mapping[str, Service], running: Processes) -> None:
        self._services = services
        self._running = running
        draw = random.Random()
        numbers = draw.sample(range(2, 250), len(services))
        third, second = draw.randrange(1, 250), draw.randrange(1, 250)
        self.address = {
            name: f"127.{second}.{third}.{number}"
            for name, number in zip(services, numbers, strict=True)
        }

    def _on_loopback(self, name: str, text: str) -> str:
        """What leads to a container, or listens on one's addresses, in terms of ours."""
        text = text.replace("0.0.0.0", self.address[name]).replace("127.0.0.1", self.address[name])
        for other, address in self.address.items():
            text = text.replace(f"@{other}:", f"@{address}:")
        return text

    def _launch(self, name: str, arguments: tuple[str, ...]) -> Launch:
        service = self._services[name]
        folder = self._running.folder / f"{name}-files"
        folder.mkdir(exist_ok=True)
        words = list(arguments)
        for target, content in service.files.items():
            file = folder / Path(target).name
            file.write_text(self._on_loopback(name, content))
            words = [word.replace(target, str(file)) for word in words]
        words = [self._on_loopback(name, word) for word in words]
        redis_server = find_redis_server()
        redis_cli = str(Path(redis_server).resolve().with_name("redis-cli"))
        programs = {"python": sys.executable, "redis-server": redis_server, "redis-cli": redis_cli}
        words[0] = programs[words[0]]
        if arguments[0] == "redis-server":
            words += ["--bind", self.address[name], "--dir", str(folder)]
        if arguments[0] == "redis-cli":
            words[1:1] = ["-h", self.address[name]]
        own = {key: self._on_loopback(name, text) for key, text in service.environment.items()}
        if own.get("BATON_ADVERTISE_HOST") == name:
            own["BATON_ADVERTISE_HOST"] = self.address[name]
        for machine in ("PATH", "BATON_CACHE"):
            own.pop(machine, None)
        return Launch(words, {**base_environment(), **own, "PYTHONPATH": str(ROOT)})

    def start(self, name: str) -> None:
        self._running.start(name, self._launch(name, self._services[name].arguments))

    def wait_healthy(self, name: str) -> None:
        """Runs its health check until that succeeds."""
        ends_at = time.monotonic() + HEALTHY_S
        check = self._launch(name, self._services[name].healthcheck)
        while (done := self._running.run(check, timeout_s=5)).returncode != 0:
            self._running.check_alive()
            assert time.monotonic() < ends_at, f"{name}: {done.stderr}\n{self._running.logs()}"
            time.sleep(0.1)


@pytest.mark.slow
def test_services_answer_a_chat_and_end_in_time(
    services: dict[str, Service], tmp_path: Path
) -> None:
    with processes(tmp_path) as running:
        compose = Compose(services, running)
        for name, service in services.items():
            assert service.definition.get("depends_on", {}).keys() <= {"redis"}, name
        compose.start("redis")
        compose.wait_healthy("redis")
        for name in OURS:
            compose.start(name)
        for name in OURS:
            compose.wait_healthy(name)
        with httpx.Client(base_url=f"http://{compose.address['gateway']}:8000", timeout=60) as api:
            question = {"role": "user", "content": "What is the capital of France?"}
            body = {"model": "smollm2-135m-instruct", "temperature": 0, "messages": [question]}
            answer = api.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text + running.logs()
            text = answer.json()["choices"][0]["message"]["content"]
            assert text == "The capital of France is Paris."
            time.sleep(1.0)  # until the workers' next report
            page = Page(api.get("/metrics").text)
            moved = page.metric(
                "baton_kv_handoff_bytes_total", transport="gloo", direction="received"
            )
            assert moved > 0
        for name in OURS:
            assert running.stop(name, within_s=services[name].stop_s) == 0, running.log(name)


def test_interpolation_knows_the_three_forms_that_the_file_uses() -> None:
    text = yaml.safe_dump(yaml.safe_load(FILE.read_text()))
    assert set(re.findall(r"\$\{\w+(:[-?])?", text)) == {":?", ":-"}
