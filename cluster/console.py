"""What `baton serve` says while it works: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table


class Progress:
    """Timed lines for what is done, and a spinner for what is waited for."""

    def __init__(self) -> None:
        # Bound to today's streams: what libraries print later goes to a log.
        self._console = Console(file=sys.stdout, highlight=False)
        self._errors = Console(file=sys.stderr, highlight=False)
        self._began = time.monotonic()
        self._status: Status | None = None

    @property
    def elapsed_s(self) -> float:
        """Since this object was made."""
        return time.monotonic() - self._began

    def done(self, text: str) -> None:
        self._console.print(f"[dim]{self.elapsed_s:6.1f} s[/dim]  {escape(text)}")

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows a spinner with ``text`` until the block ends; nothing off a terminal."""
        self._status = self._console.status(escape(text), spinner="line")
        with self._status:
            try:
                yield
            finally:
                self._status = None

    def update(self, text: str) -> None:
        """Changes the spinner's text."""
        if self._status is not None:
            self._status.update(escape(text))

    def say(self, text: str) -> None:
        """A line as it is: never wrapped, so that it can be copied."""
        self._console.print(text, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        self._console.print(table)

    def warn(self, text: str) -> None:
        self._errors.print(f"[yellow]baton:[/yellow] {escape(text)}", soft_wrap=True)

    def fail(self, text: str) -> None:
        self._errors.print(f"[red]baton:[/red] {escape(text)}", soft_wrap=True)
