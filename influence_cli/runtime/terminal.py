"""Everything that goes to stderr: progress, warnings, what was done, what to do next. Data never goes through here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from influence_cli.errors import printable
from influence_cli.runtime import distributed
from influence_cli.runtime.work import during

Advance = Callable[[float], None]


class _Rate(ProgressColumn):
    """Examples per second, or the time of one if it takes longer than a second."""

    def render(self, task: Task) -> Text:
        """Write the rate of a task."""
        if not task.speed:
            return Text("–/s", style="dim")
        return Text(f"{task.speed:,.0f}/s" if task.speed >= 1 else f"{duration(1 / task.speed)} each", style="dim")


class _Stderr(Console):
    def print(self, *objects: Any, **words: Any) -> None:
        """Continue if stderr cannot be written, such as a log on a full disk: the work matters more."""
        try:
            super().print(*objects, **words)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Continue without stderr if nobody reads it any more; the default ends the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@dataclass
class Terminal:
    """Where a command reports to the person who runs it; of several processes only the first one prints.

    Attributes:
        quiet: only warnings and errors.
        verbose: details too.
        warnings: the warnings so far, for the run file.
        silent: not even warnings are printed: they are only collected. What is called without a terminal has this one.
    """

    quiet: bool = False
    verbose: bool = False
    warnings: list[str] = field(default_factory=list)
    silent: bool = False

    @property
    def console(self) -> Console:
        """Give a console on the present stderr; NO_COLOR is Rich's to respect."""
        return _Stderr(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line about what was done or found."""
        if self._speaks():
            self.console.print(printable(text), markup=False)

    def detail(self, text: str) -> None:
        """Print one line that only ``-v`` shows."""
        if self.verbose and self._speaks():
            self.console.print(printable(text), markup=False, style="dim")

    def warn(self, text: str) -> None:
        """Print a warning once: its cause and its remedy."""
        if text not in self.warnings:
            self.warnings.append(text)
            if self.silent or not distributed.is_first():
                return  # the first one hears of it (distributed.hear)
            self.console.print(Text.assemble(("warning: ", "yellow"), printable(text)))

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Advance]:
        """Show a bar with a rate and an ETA while the block runs; silent where stderr is not a terminal.

        Yields:
            A function that takes the number of newly finished examples.
        """
        if not self._shows():
            with during(what):
                yield lambda _: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Rate())
        with Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        ) as bars:
            bar = bars.add_task(what, total=total)
            with during(what):
                yield lambda count: bars.advance(bar, count)

    @contextmanager
    def status(self, what: str) -> Iterator[None]:
        """Show that something without a known length is going on."""
        with during(what):
            if not self._shows():
                yield
                return
            with self.console.status(what):
                yield

    def _shows(self) -> bool:
        return self._speaks() and sys.stderr.isatty()

    def _speaks(self) -> bool:
        return not (self.quiet or self.silent) and distributed.is_first()


def or_silent(terminal: Terminal | None) -> Terminal:
    """Give the terminal, or where a caller has none, a silent one of its own."""
    return Terminal(silent=True) if terminal is None else terminal


def duration(seconds: float) -> str:
    """Write a time for people: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
