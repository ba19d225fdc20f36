"""Constants that every process of one Baton cluster must agree on."""

from __future__ import annotations

import secrets

PROTOCOL_VERSION = 2
"""Version of both protos. Workers and gateways of different versions never pair. It is raised
where a peer that passes over what is new would answer wrongly; a field that only changes when
something happens, and is absent by default, needs no new one."""

EPOCH_BYTES = 16
"""An epoch is 128 random bits, drawn at a process's start, compared for equality only."""

AUTH_METADATA_KEY = "authorization"
"""gRPC metadata key; its value is ``Bearer <cluster secret>``."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest gRPC message, both ways: a prompt of several million token ids."""


def new_epoch() -> bytes:
    """A fresh epoch for this process."""
    return secrets.token_bytes(EPOCH_BYTES)
