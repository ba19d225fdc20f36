"""A conversation to the prompt text that its checkpoint was trained on.

The template is the checkpoint's own Jinja source, rendered in an immutable
sandbox with the helpers that templates published for ``transformers`` expect.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import CheckpointError, InvalidRequestError

_log = logging.getLogger(__name__)


class _GenerationBlock(Extension):
    """``{% generation %}`` marks assistant text for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    # Unlike jinja's own, this one escapes nothing for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One checkpoint's template, compiled once. Safe to render from several threads."""

    def __init__(self, source: str, *, bos_token: str | None, eos_token: str | None) -> None:
        """Raises CheckpointError for a template that is no valid Jinja."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template does not compile: line {error.lineno}: {error}"
            ) from None
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._special = {name: token for name, token in tokens.items() if token is not None}
        self._knows_developer = "developer" in source

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, up to where the assistant's answer begins.

        A developer message is given to a template that does not know this role as
        a system message. Raises InvalidRequestError, naming ``messages``, for a
        conversation that the template refuses.
        """
        try:
            return self._template.render(
                messages=[self._message(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except jinja2.TemplateError as error:
            reason = str(error) or type(error).__name__
        except Exception as error:
            # The template is foreign code: whatever it stumbles over came with the messages.
            _log.info("the chat template raised %s", type(error).__name__)
            reason = type(error).__name__
        raise InvalidRequestError(
            f"the model's chat template does not accept these messages: {reason}", param="messages"
        )

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        copy = dict(message)
        if copy["role"] == "developer" and not self._knows_developer:
            copy["role"] = "system"
        return copy
