"""The hand-off's transports, for tests that hold for every one of them."""

from __future__ import annotations

import pytest

from kv_transfer.transports import nixl_links

needs_nixl = pytest.mark.skipif(
    not nixl_links.installed(), reason="needs the package nixl-cu12: pip install '.[nixl]'"
)
TRANSPORTS = ["shared_memory", "gloo", pytest.param("nixl", marks=needs_nixl)]
