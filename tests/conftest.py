"""Every test begins with the environment of a machine on which Baton was never set up.

Under ``pytest -n`` the tests of a file stay in one process, and so do files that share what is
dear to make, or that would disturb each other.
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

_SERVERS = "whole servers, which would take the cores from each other"
_FIRST = "environments of 1.6 GB; Ray in the test's own process"
_TOGETHER = {
    "tests/e2e/": _SERVERS,
    "tests/integration/test_deploy_": _FIRST,
    # Ray takes its way of authentication from the environment when it is first imported:
    # other tests import it too, within the test and not with their file.
    "tests/integration/test_pool_backends": _FIRST,
}
"""By the beginning of a file's path, the group that it stays in."""
_BY_THEMSELVES = (
    "tests/e2e/test_bfloat16.py",
    "tests/e2e/test_exactness.py",
    "tests/e2e/test_routing_trace.py",
)
"""Servers too, of which nothing is asked in time: in whichever process has time."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = nodeid.split("::")[0]
            if file in _BY_THEMSELVES:
                return file
            return next((_TOGETHER[start] for start in _TOGETHER if file.startswith(start)), file)

        def _assign_work_unit(self, node: Any) -> None:
            """The long ones first: what is left at the end is then short."""
            for group in (*_BY_THEMSELVES, _FIRST, _SERVERS):
                if group in self.workqueue:
                    self.workqueue.move_to_end(group, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)
