"""The locustfile's options. They are fields of the web UI too; benchmarks/README.md lists them."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from locust.argument_parser import LocustArgumentParser


def _positive(text: str) -> float:
    if not (number := float(text)) > 0:
        raise ArgumentTypeError(f"{text} is not over 0")
    return number


def _seconds(text: str) -> float:
    if not (number := float(text)) >= 0:
        raise ArgumentTypeError(f"{text} is under 0")
    return number


def _at_least(lowest: int) -> Any:
    def parse(text: str) -> int:
        if (number := int(text)) < lowest:
            raise ArgumentTypeError(f"{text} is under {lowest}")
        return number

    return parse


def add_options(parser: LocustArgumentParser) -> None:
    add: Any = parser.add_argument
    add("--objective-ttft", type=_positive, default=3.0, metavar="S", help="Seconds; 3.")
    add("--objective-itl", type=_positive, default=0.15, metavar="S", help="Seconds; 0.15.")
    text = "Of a request's gaps, the percentile that must be within the objective; 99."
    add("--objective-itl-percentile", type=_positive, default=99.0, metavar="P", help=text)
    text = "Mean seconds between an answer and the next question, exponential; 5."
    add("--think-time", type=_seconds, default=5.0, metavar="S", help=text)
    text = "Instead: every user asks once in so many seconds, or as soon as it can; 0 is off."
    add("--pace", type=_seconds, default=0.0, metavar="S", help=text)
    text = "Of a conversation at most; fewer where the context is full. 4."
    add("--turns", type=_at_least(1), default=4, metavar="N", help=text)
    add("--answer-tokens", type=_at_least(1), default=64, metavar="N", help="At most; 64.")
    text = "Length of a long document; 1500."
    add("--document-tokens", type=_at_least(1), default=1500, metavar="N", help=text)
    for name, weight in (("chat", 3), ("document", 1)):
        text = f"Share of {name} users; {weight}."
        add(f"--{name}-weight", type=_at_least(0), default=weight, metavar="N", help=text)
    text = "End once so many requests are over (of each locust process); 0 is off."
    add("--requests", type=_at_least(0), default=0, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="Of everything that is said; 0.")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, which is greedy.")
    add("--model", default="", metavar="NAME", help="By default the first that the server has.")
    text = "Tokens of prompt and answer; by default what the server tells."
    add("--context", type=_at_least(0), default=0, metavar="N", help=text)
    text = "Of a whole request, in seconds; 300."
    add("--request-timeout", type=_positive, default=300.0, metavar="S", help=text)
    text = "Answers of --answer-tokens exactly, by `ignore_eos`: Baton and vLLM know it."
    add("--fixed-length", action="store_true", help=text)
    text = "Ask for `return_token_ids`, which Baton and vLLM know: every token is timed."
    add("--token-ids", action="store_true", help=text)
    text = "Sent as Bearer token."
    hidden = {"include_in_web_ui": False}
    add("--api-key", default="", env_var="BATON_API_KEY", metavar="KEY", help=text, **hidden)
    text = "Write figures and records as JSON."
    add("--report-json", default="", metavar="FILE", help=text, **hidden)
