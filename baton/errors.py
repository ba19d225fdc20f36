"""The one tree of errors.

    BatonError
    ├── InvalidRequestError        the client's request cannot be served as it is
    │   ├── UnsupportedError       a field or value that Baton does not serve yet
    │   ├── ContextLengthError     prompt and answer do not fit the context
    │   └── RequestTooLargeError   the body is over the configured size
    ├── AuthenticationError        a missing or wrong secret
    ├── ModelNotFoundError         no such model here
    ├── OverloadedError            the bounded queue is full; try again later
    ├── DeadlineExceededError      the request's deadline ran out
    ├── CancelledError             the client left, or asked to cancel
    ├── UnavailableError           no worker can serve now
    │   ├── WorkerLostError        a worker died or its Session was lost
    │   ├── ReservationError       a decode worker has no room; pair anew
    │   │   └── RoomElsewhereError another one has; ends an attempt, never a request
    │   └── DrainingError          the process is going away
    ├── TransferError              a KV hand-off failed
    │   ├── TransferCorruptError   bytes differ from their checksum
    │   ├── LeaseExpiredError      the sender may have reused its blocks
    │   └── IncompatiblePeerError  layouts, versions or generations differ
    ├── ConfigurationError         a setting is wrong; names it and what to do
    ├── CheckpointError            a model's files are missing, damaged or unsupported
    └── InternalError              a fault of ours

Every leaf maps to one HTTP status with an OpenAI-style body and to one gRPC
code, and has a ``code`` that is the same on the wire, in logs and in metrics.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class BatonError(Exception):
    """Base of the tree; only its leaves are raised.

    ``retriable`` says that another attempt, on another worker, may succeed.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    openai_type: ClassVar[str] = "server_error"
    retriable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the OpenAI API for this error."""
        return {
            "error": {
                "message": self.message,
                "type": self.openai_type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequestError(BatonError):
    code = "invalid_request"
    http_status = 400
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    openai_type = "invalid_request_error"


class UnsupportedError(InvalidRequestError):
    code = "unsupported"
    grpc_code = grpc.StatusCode.UNIMPLEMENTED


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class RequestTooLargeError(InvalidRequestError):
    code = "request_too_large"
    http_status = 413


class AuthenticationError(BatonError):
    code = "invalid_api_key"
    http_status = 401
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    openai_type = "invalid_request_error"


class ModelNotFoundError(BatonError):
    code = "model_not_found"
    http_status = 404
    grpc_code = grpc.StatusCode.NOT_FOUND
    openai_type = "invalid_request_error"


class OverloadedError(BatonError):
    code = "overloaded"
    http_status = 429
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    openai_type = "rate_limit_error"


class DeadlineExceededError(BatonError):
    code = "deadline_exceeded"
    http_status = 504
    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    openai_type = "timeout_error"


class CancelledError(BatonError):
    code = "cancelled"
    http_status = 499
    grpc_code = grpc.StatusCode.CANCELLED


class UnavailableError(BatonError):
    code = "unavailable"
    http_status = 503
    grpc_code = grpc.StatusCode.UNAVAILABLE
    openai_type = "service_unavailable"
    retriable = True


class WorkerLostError(UnavailableError):
    code = "worker_lost"


class ReservationError(UnavailableError):
    code = "reservation_refused"


class RoomElsewhereError(ReservationError):
    code = "room_elsewhere"


class DrainingError(UnavailableError):
    code = "draining"


class TransferError(BatonError):
    code = "transfer_failed"
    http_status = 503
    grpc_code = grpc.StatusCode.ABORTED
    openai_type = "service_unavailable"
    retriable = True


class TransferCorruptError(TransferError):
    code = "transfer_corrupt"
    grpc_code = grpc.StatusCode.DATA_LOSS


class LeaseExpiredError(TransferError):
    code = "lease_expired"


class IncompatiblePeerError(TransferError):
    code = "incompatible_peer"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class ConfigurationError(BatonError):
    code = "configuration_error"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class CheckpointError(BatonError):
    code = "checkpoint_error"
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class InternalError(BatonError):
    pass


def _tree(root: type[BatonError]) -> list[type[BatonError]]:
    found = [root]
    for child in root.__subclasses__():
        found += _tree(child)
    return found


def from_code(code: str, message: str) -> BatonError:
    """The error that a peer named by its wire code; an unknown code is internal."""
    for kind in _tree(BatonError)[1:]:
        if kind.code == code:
            return kind(message)
    return InternalError(f"{message} (code {code!r})")
