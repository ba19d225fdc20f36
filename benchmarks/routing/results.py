"""What a replay found out about each policy, as it is kept in a file, and whether it is good
enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.measured import Measured
from benchmarks.page import KeptResults

GOAL = 0.9
"""Of the oracle's cached tokens: for kv_aware with local prefill, as it is by default."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all policies were given."""

    num_users: int
    num_requests: int
    num_distinct_blocks: int
    """That the requests ever fill."""
    block_size: int
    num_workers: int
    """Of each pool."""
    worker_blocks: int


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One run of the trace."""

    policy: str
    local_prefill_max_tokens: int
    num_cached: int
    """Prompt tokens that no worker computed, by the answers' own word."""
    num_not_computed: int
    """The same by the workers' count."""
    ratio: float
    """Of what the oracle, one endless cache, would have had of this very run."""
    optimal_ratio: float
    """The same, at most, of one cache as large as a pool that knows the future."""
    ttft_p50_ms: float
    ttft_p90_ms: float
    handoff_mib: float
    duration_s: float
    by_worker: Mapping[str, int]
    """Input tokens."""
    num_preemptions: int
    same_answers: bool
    """As one pair of workers with ample room gave, token for token."""
    index_is_true: bool
    """At rest, hash for hash."""

    @property
    def label(self) -> str:
        """As a table has it; other policies never prefill locally."""
        if self.policy != "kv_aware":
            return self.policy
        local = self.local_prefill_max_tokens
        return f"kv_aware, up to {local} locally" if local else "kv_aware, nothing locally"

    @property
    def remarks(self) -> str:
        return ", ".join(self._remarks())

    def _remarks(self) -> Iterator[str]:
        yield "same answers" if self.same_answers else "ANSWERS DIFFER"
        yield "index true" if self.index_is_true else "INDEX WRONG"
        if self.num_cached != self.num_not_computed:
            yield f"workers say {self.num_not_computed:,} cached"
        if self.num_preemptions:
            yield f"{self.num_preemptions} preemptions"


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    setting: Setting
    policies: tuple[PolicyResult, ...]

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            Measured(**data["measured"]),
            Setting(**data["setting"]),
            tuple(PolicyResult(**each) for each in data["policies"]),
        )


def faults(results: Results) -> list[str]:
    """Sentences on what is not as it has to be; none if all is well."""
    found = []
    for each in results.policies:
        promised = each.policy == "kv_aware" and each.local_prefill_max_tokens > 0
        if promised and each.ratio < GOAL:
            found.append(f"{each.label} has {each.ratio:.3f} of the oracle's tokens, not {GOAL}")
        if not each.same_answers:
            found.append(f"{each.label} gave other answers than one pair of workers")
        if not each.index_is_true:
            found.append(f"at rest of {each.label} the KV index is not what the workers hold")
    return found
