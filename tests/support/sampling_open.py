"""A gateway's Open to a sequence, on the tiny model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from support.tiny_engine import DOMAIN, TINY, model_config

from baton.v1 import session_pb2 as pb
from engine.intake import check_open, sequence_from_open
from engine.sequence import Sequence

PLAN: Any = SimpleNamespace(
    checkpoint=SimpleNamespace(config=model_config(TINY)), domain=DOMAIN, max_model_len=512
)


def opened(message: pb.Open) -> Sequence:
    """What a worker of either kind makes of it."""
    check_open(message, PLAN, "decode")
    return sequence_from_open("key", message, PLAN)
