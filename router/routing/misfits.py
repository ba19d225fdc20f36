"""Workers that are there and get no requests, because they are unlike the others, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from baton.protocol import PROTOCOL_VERSION
from baton.records import WorkerRecord
from router.routing.pairing import kind_of
from router.workers.session import WorkerSession


def without_partner(
    prefill: Sequence[WorkerSession], decode: Sequence[WorkerSession]
) -> str | None:
    """A sentence that names those which no worker of the other role can be paired with, and
    what differs; None where there are none, or workers of one role alone."""
    workers = [*sorted(prefill, key=_name), *sorted(decode, key=_name)]
    kinds = {kind_of(session) for session in prefill} & {kind_of(session) for session in decode}
    alone = [session for session in workers if kind_of(session) not in kinds]
    if not (prefill and decode and alone):
        return None
    facts = {session.epoch: _facts(session) for session in workers}
    first, *others = facts.values()
    differing = [name for name in first if any(each[name] != first[name] for each in others)]
    # It sums the others up, so it is told only where they leave two workers alike that are not.
    told = [name for name in differing if name != "digest"]
    if len({tuple(each[name] for name in told) for each in facts.values()}) < len(
        {kind_of(session) for session in workers}
    ):
        told = differing

    def named(sessions: Iterable[WorkerSession]) -> str:
        alike: dict[str, list[str]] = {}
        for session in sessions:
            what = ", ".join(f"{name} {facts[session.epoch][name]}" for name in told)
            alike.setdefault(what, []).append(_name(session))
        return ", ".join(f"{' and '.join(ids)} ({what})" for what, ids in alike.items())

    sentence = f"No worker of the other role can be paired with {named(alone)}"
    paired = [session for session in workers if kind_of(session) in kinds]
    return f"{sentence}; those that are paired: {named(paired)}." if paired else f"{sentence}."


def _name(session: WorkerSession) -> str:
    return session.record.worker_id


def _facts(session: WorkerSession) -> dict[str, str]:
    record = session.record
    return {
        "generation": repr(record.generation),
        "protocol": str(record.protocol_version),
        "block size": str(record.block_size),
        "dtype": session.kv_dtype,
        "digest": record.digest[:8],
    }


def strangers(records: Iterable[WorkerRecord], generation: str) -> str | None:
    """Those that a gateway of ``generation`` has no Session with, and why; None without any."""
    reasons = []
    for record in records:
        if record.protocol_version != PROTOCOL_VERSION:
            what = f"protocol {record.protocol_version}, this gateway's is {PROTOCOL_VERSION}"
        elif record.generation != generation:
            what = f"generation {record.generation!r}, this gateway's is {generation!r}"
        else:
            continue
        reasons.append(f"{record.worker_id} ({what})")
    return ", ".join(reasons) or None
