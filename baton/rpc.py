"""gRPC as Baton uses it: one set of options, one secret on every port."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from baton.config import SessionConfig
from baton.protocol import AUTH_METADATA_KEY, MAX_MESSAGE_BYTES

Handler = Any  # grpc.RpcMethodHandler, which the stubs type by request and response
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


def channel_options(session: SessionConfig) -> list[tuple[str, int]]:
    """Options of servers and clients alike: sizes, and keep-alive that finds a dead peer even
    when idle: within ``keepalive_s + keepalive_timeout_s`` of the last ping, and gRPC spaces
    its pings out, so that a stopped process has been seen to last three times as long."""
    interval_ms = int(session.keepalive_s * 1000)
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", int(session.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", interval_ms // 2),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def auth_metadata(secret: str) -> tuple[tuple[str, str], ...]:
    """Metadata that opens a worker's port."""
    return ((AUTH_METADATA_KEY, f"Bearer {secret}"),)


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without the cluster secret, compared in constant time."""

    def __init__(self, secret: str) -> None:
        self._expected = f"Bearer {secret}".encode()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get(AUTH_METADATA_KEY, "")
        encoded = given.encode() if isinstance(given, str) else bytes(given)
        if hmac.compare_digest(encoded, self._expected):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "missing or wrong cluster secret (BATON_SECRET)"
    )


def server(secret: str, session: SessionConfig) -> grpc.aio.Server:
    """A gRPC server that asks every caller for the cluster secret."""
    return grpc.aio.server(
        interceptors=(SecretInterceptor(secret),), options=channel_options(session)
    )


def channel(address: str, session: SessionConfig) -> grpc.aio.Channel:
    """A client channel to a worker at ``host:port``; the caller closes it."""
    return grpc.aio.insecure_channel(address, options=channel_options(session))
