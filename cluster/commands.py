"""What is run for each process of a cluster, and what it is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.config import BatonConfig
from baton.credentials import CLUSTER_SECRET
from baton.worker.environment import worker_environment
from cluster.processes_backend import Command

MODULES: Mapping[str, str] = {
    "gateway": "router.main",
    "prefill": "prefill_workers.main",
    "decode": "decode_workers.main",
}
"""What `python -m` runs for the gateway and for each role."""


@dataclass(frozen=True, slots=True)
class Commands:
    """Of one cluster, whose processes all read ``config_file``."""

    config: BatonConfig
    config_file: Path
    secret: str = field(repr=False)
    redis_url: str = field(repr=False)
    modules: Mapping[str, str] = field(default_factory=lambda: MODULES)

    def worker(self, pool: str, worker_id: str) -> Command:
        module = self.modules[self.config.pools[pool].role]
        return self._command(module, "--pool", pool, "--worker-id", worker_id)

    def gateway(self, gateway_id: str, port: int) -> Command:
        module = self.modules["gateway"]
        return self._command(module, "--gateway-id", gateway_id, "--port", str(port))

    def _command(self, module: str, *arguments: str) -> Command:
        secrets_of_all = {CLUSTER_SECRET: self.secret, "REDIS_URL": self.redis_url}
        environment = worker_environment(os.environ) | secrets_of_all
        # -P: a folder named like one of our packages, where the user stands, is not it.
        python = (sys.executable, "-P", "-m", module, "--config", str(self.config_file))
        return Command((*python, *arguments), environment)
