"""Stop strings: found across pieces, never shown, nothing else held back for good."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from router.tokenization.stop_strings import StopStrings

_texts = st.text("ab", max_size=30)
_stops = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def scan(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What is shown piece by piece, the last flush included, and whether a stop was found."""
    scanner = StopStrings(stops).scanner()
    shown = []
    for piece in pieces:
        scanned = scanner.push(piece)
        shown.append(scanned.text)
        if scanned.matched:
            return shown, True
    return [*shown, scanner.flush()], False


def first_complete(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow and obvious way: what is before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(_texts, _stops, st.lists(st.integers(0, 30), max_size=6))
def test_outcome_equals_the_obvious_scan_wherever_the_text_is_cut(text, stops, cuts) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    shown, matched = scan(pieces, stops)
    assert ("".join(shown), matched) == first_complete(text, stops)


@given(_texts, _stops)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops) -> None:
    scanner = StopStrings(stops).scanner()
    shown = ""
    for end, character in enumerate(text, start=1):
        scanned = scanner.push(character)
        shown += scanned.text
        if scanned.matched:
            break
        held = text[len(shown) : end]
        longest = max(
            (
                length
                for stop in stops
                for length in range(len(stop))
                if text[:end].endswith(stop[:length])
            ),
        )
        assert len(held) == longest


def test_false_start_that_holds_another_start_is_not_lost() -> None:
    assert scan(list("aaab!"), ["aab"])[1]
    assert scan(["x abab", "ac"], ["abac"]) == (["x ab", ""], True)


def test_stop_string_across_three_pieces_is_cut_out() -> None:
    assert scan(["one EN", "D", "ING two"], ["ENDING"]) == (["one ", "", ""], True)


def test_false_start_is_shown_once_it_is_none() -> None:
    assert scan(["a END", "LESS", " b"], ["ENDING"]) == (["a ", "ENDLESS", " b", ""], False)


def test_held_tail_comes_out_at_the_end() -> None:
    assert scan(["wait EN"], ["ENDING"]) == (["wait ", "EN"], False)


def test_without_stop_strings_text_passes() -> None:
    assert scan(["a", "b"], []) == (["a", "b", ""], False)


def test_scanners_of_one_request_do_not_share_state() -> None:
    stops = StopStrings(["xy"])
    first, second = stops.scanner(), stops.scanner()
    first.push("x")
    assert second.push("y").text == "y"
    assert first.push("y").matched
