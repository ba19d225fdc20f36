"""`baton serve` around stand-in processes, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.procfs import ProcessName, descendants, name_of

TESTS = Path(__file__).resolve().parents[1]

SERVE = """
import os, sys
from pathlib import Path
from baton.config import load_config
from cluster.serve import serve
modules = {"gateway": "support.standin_gateway"}
modules |= dict.fromkeys(("prefill", "decode"), "support.standin_worker")
config = load_config(Path(sys.argv[1])).model_copy(update={"model": "smollm2-135m-instruct"})
sys.exit(serve(config, redis_url=os.environ.get("REDIS_URL"), modules=modules))
"""

QUICK = {"gateway": {"port": 0, "drain_s": 0}, "cluster": {"backend": "processes"}}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends_at, what
        time.sleep(0.02)


class Serving:
    """One launcher in a process of its own."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        behaviour: str = "",
        *,
        redis_url: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        self.state_folder = folder / "state" / "default"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "REDIS_URL"},
            **({"REDIS_URL": redis_url} if redis_url else {}),
            "STANDIN_FOLDER": str(folder),
            "STANDIN_BEHAVIOUR": behaviour,
            "BATON_STATE_DIR": str(folder / "state"),
            "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        self.output = folder / "output"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(config)],
                stdout=out,
                stderr=out,
                env=self.environment,
            )

    def wait_ready(self) -> list[ProcessName]:
        """Everything that runs once it is ready."""
        wait_until(lambda: "curl" in self.text or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.text
        return self.processes()

    def processes(self) -> list[ProcessName]:
        """All that descend from it now."""
        return descendants(self.process.pid)

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def temp_folder(self) -> Path:
        return Path(self.state["temp_folder"])

    @property
    def state(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.state_folder / "state.json").read_text())
        return result

    def worker(self, worker_id: str) -> ProcessName:
        name = name_of(int((self.folder / f"{worker_id}.worker").read_text()))
        assert name is not None
        return name

    def workers(self) -> dict[str, int]:
        """Pid of every stand-in worker that has a process, by its name."""
        pids = {f.stem: int(f.read_text() or 0) for f in self.folder.glob("*.worker")}
        return {name: pid for name, pid in sorted(pids.items()) if pid and name_of(pid)}

    def baton(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One `baton` command beside the server, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
