"""Every test begins with the environment of a machine on which Baton was never set up.

Under ``pytest -n`` the tests of a file stay together, and files with something in common that
is dear to make, or that would take the machine from each other, stay in one process.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

_KEPT = ("BATON_CACHE", "BATON_LOG_LEVEL", "BATON_KUBERAY_SCHEMA")

for _name in list(os.environ):
    if _name == "REDIS_URL" or (_name.startswith("BATON_") and _name not in _KEPT):
        del os.environ[_name]

# As our workers have it: how long a compute thread spins before it sleeps. With libgomp's
# default two test processes on two cores spend their time in waiting for each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_TOGETHER = ("tests/e2e/", "tests/integration/test_deploy_")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = nodeid.split("::")[0]
            return next((start for start in _TOGETHER if file.startswith(start)), file)

    return Scheduling(config, log)
