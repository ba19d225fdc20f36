"""Kill -9, SIGSTOP and delays at every fault point of a hand-off, under requests of every kind:
each ends with exactly its answer, and nothing is left behind.

    make chaos-handoff                                  # 200 cases
    make chaos-handoff ARGS="-s -k gloo-017"            # one of them
    CHAOS_SEED=5 make chaos-handoff                     # 200 others

The first ``ROUND`` cases belong to every run of the tests. With ``-s`` each says how it went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.chaos_cluster import ChaosCluster, Course
from support.handoff_schedule import (
    COVER,
    ROUND,
    SEED,
    TRANSPORTS,
    TWO_SIDED,
    WORKER_POINTS,
    Case,
    cases_of_round,
)

NUM_CASES = 200
CASES = [case for each in range(NUM_CASES // ROUND) for case in cases_of_round(SEED, each)]


class Clusters:
    """One at a time: a round's over one transport."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._cluster: ChaosCluster | None = None
        self._of: tuple[str, int] | None = None
        self.courses: list[Course] = []
        self.num_failed = 0

    def run(self, case: Case) -> Course:
        return self._count(self._for(case).run, case)

    def lose_all_but(self, survivor: str, case: Case) -> Course:
        """While clients ask what they do in that case."""
        return self._count(self._for(case).lose_all_but, survivor, case.asks)

    def _for(self, case: Case) -> ChaosCluster:
        of = (case.transport, case.number // ROUND)
        if self._of != of or self._cluster is None or self._cluster.broken:
            self.close()
            folder = self._factory.mktemp("chaos")
            self._cluster = ChaosCluster(folder, case.transport, case.seed, of[1])
            self._of = of
            self._cluster.start()
        return self._cluster

    def _count(self, run: Callable[..., Course], *what: object) -> Course:
        self.num_failed += 1
        course = run(*what)
        self.num_failed -= 1
        self.courses.append(course)
        print(
            f"    longest gap {course.longest_gap_s:.2f} s, whole after {course.whole_s:.1f} s, "
            f"at rest {course.rest_s:.1f} s after the last answer"
        )
        return course

    def close(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.stop()


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(tmp_path_factory)
    yield clusters
    clusters.close()
    courses = clusters.courses
    if not courses:
        return
    print(
        f"\n{len(courses) + clusters.num_failed} cases, {clusters.num_failed} failed; "
        f"{sum(len(course.answers) for course in courses)} requests; longest gap "
        f"{max(course.longest_gap_s for course in courses):.2f} s; whole again after "
        f"{max(course.whole_s for course in courses):.1f} s at most"
    )


def test_rounds_have_every_point_and_all_that_can_happen_there() -> None:
    for number in range(3):
        assert sorted(case.point for case in cases_of_round(SEED, number)) == WORKER_POINTS
    happened = {
        (case.point, case.transport, case.action)
        for number in range(COVER)
        for case in cases_of_round(SEED, number)
    }
    for point in WORKER_POINTS:
        for transport in TWO_SIDED.get(point, TRANSPORTS):
            assert {(point, transport, "kill"), (point, transport, "stop")} <= happened


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.chaos] if case.number >= ROUND else [])
        for case in CASES
    ],
)
def test_every_request_outlives_a_fault_and_nothing_is_left(clusters: Clusters, case: Case) -> None:
    print(f"\n{case}")
    clusters.run(case)


@pytest.mark.slow
def test_every_request_finishes_while_one_decode_worker_lives(clusters: Clusters) -> None:
    clusters.lose_all_but("decode-1", CASES[ROUND - 1])
