"""A replay's report: the policies side by side, and what they come to in sentences."""

from __future__ import annotations

from benchmarks.routing.report import Row, table
from benchmarks.routing.results import GOAL, PolicyResult, Results, Setting, faults


def sizes(setting: Setting) -> str:
    """How large the pools are, in a sentence."""
    pool = setting.num_workers * setting.worker_blocks
    share = pool / setting.num_distinct_blocks if setting.num_distinct_blocks else 1.0
    return (
        f"{setting.num_requests} requests of {setting.num_users} users fill "
        f"{setting.num_distinct_blocks} blocks of {setting.block_size} tokens; each of "
        f"{setting.num_workers} prefill and {setting.num_workers} decode workers has "
        f"{setting.worker_blocks}, so that each pool holds {share:.0%} of them."
    )


def policies(results: Results) -> str:
    """A table, on a terminal and in Markdown alike."""
    rows = [
        Row(
            policy=each.label,
            num_cached=each.num_cached,
            ratio=each.ratio,
            ttft_p50_ms=each.ttft_p50_ms,
            ttft_p90_ms=each.ttft_p90_ms,
            handoff=f"{each.handoff_mib:,.0f} MiB",
            by_worker=each.by_worker,
            remarks=each.remarks,
        )
        for each in results.policies
    ]
    return table(rows, by_worker="input tokens by worker")


def section(results: Results) -> str:
    """The whole report."""
    setting = (
        f"{results.measured.sentence} {sizes(results.setting)} The *oracle* is one endless cache "
        "that sees the same requests. Each policy served the trace once, so small differences, "
        "of TTFTs above all, say nothing."
    )
    return "\n\n".join([setting, policies(results), " ".join(_sentences(results))])


def _sentences(results: Results) -> list[str]:
    said = []
    bound = max((each.optimal_ratio for each in results.policies), default=1.0)
    for each in results.policies:
        if each.policy == "kv_aware":
            goal = _goal(each) if each.local_prefill_max_tokens else ""
            said.append(f"*{each.label}* had {each.ratio:.3f} of the oracle's tokens{goal}.")
    others = [each.ratio for each in results.policies if each.policy != "kv_aware"]
    if others:
        least, most = f"{min(others):.3f}", f"{max(others):.3f}"
        said.append(f"The others had {least if least == most else f'{least} to {most}'}.")
    said.append(
        f"One cache as large as a pool that knew the future would have had at most {bound:.3f}."
    )
    if not faults(results):
        said.append(
            "Every answer was the same, token for token, under each policy, and at rest the "
            "gateway's KV index was what the workers held, hash for hash."
        )
    said += [f"**Not as it has to be: {sentence}.**" for sentence in faults(results)]
    return said


def _goal(result: PolicyResult) -> str:
    word = "reached" if result.ratio >= GOAL else "missed"
    return f" (the goal of {GOAL} is {word})"
