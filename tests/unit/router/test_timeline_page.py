"""docs/api.md says how many candidates a timeline shows, and of which policies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from baton.config import RoutingConfig
from router.routing.kv_aware import MAX_CANDIDATES

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


def test_candidates_are_as_many_as_the_page_says() -> None:
    (said,) = re.findall(r"`candidates`: the (\d+) cheapest", PAGE)
    assert int(said) == MAX_CANDIDATES


def test_the_policy_that_knows_costs_is_the_one_that_the_page_names() -> None:
    (said,) = re.findall(r"`routing\.policy` knows no costs: all but `(\w+)`", PAGE)
    assert said in get_args(RoutingConfig.model_fields["policy"].annotation)
    assert said == RoutingConfig().policy
