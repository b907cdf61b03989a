"""One run of a command: what ran, with which options, and what came out."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence_cli.config.schema import Config
from influence_cli.results.record import RunRecord, record_facts
from influence_cli.runtime.terminal import Terminal


def command_line() -> str:
    return shlex.join(["influence", *sys.argv[1:]])


@dataclass
class Session:
    """One run of a command.

    Attributes:
        loaded: the resolved config, or None for a command that needs none.
        terminal: stderr.
        format: how rows are written.
        output: the file of ``-o``, or None for stdout.
        run: what the command noted, written next to the file of ``-o``.
        started: when it began.
    """

    loaded: Config | None
    terminal: Terminal
    format: str
    output: Path | None
    run: RunRecord = field(default_factory=RunRecord)
    started: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> Config:
        """Give the resolved config."""
        if self.loaded is None:
            raise ValueError("a command that reads no config")
        return self.loaded

    @property
    def seconds(self) -> float:
        """Count the seconds since the command began."""
        return time.perf_counter() - self.started


def run_facts(session: Session) -> dict[str, Any]:
    """Gather the facts of the run: command, versions, config, seconds, warnings and what the command noted."""
    import platform

    # A command that works on files alone has not loaded torch.
    loaded = sys.modules.get("torch")
    torch = {} if loaded is None else {"torch": str(loaded.__version__)}
    from influence_cli import __version__

    return {
        "command": ["influence", *sys.argv[1:]],
        "versions": {"influence": __version__, "python": platform.python_version(), **torch},
        "seconds": round(session.seconds, 3),
        "warnings": session.terminal.warnings,
        **({"config": session.loaded.resolved()} if session.loaded is not None else {}),
        **record_facts(session.run),
    }
