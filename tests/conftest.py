"""Every test begins with the environment of a machine on which Baton was never set up."""

from __future__ import annotations

import os

_KEPT = ("BATON_CACHE", "BATON_LOG_LEVEL", "BATON_KUBERAY_SCHEMA")

for _name in list(os.environ):
    if _name == "REDIS_URL" or (_name.startswith("BATON_") and _name not in _KEPT):
        del os.environ[_name]
