"""What the peers' scripts share: the case, its model, the clock, and a record that is written after every step.

Runs in each peer's own environment, so it needs torch, torchvision and numpy only and never imports influence_cli.
A record is one JSON object; its "steps" are {"method", "step", ...} with one of
seconds      a number, or "> 300 s" for a step that was stopped at the limit
unsupported  what the peer does not offer
error        the last line of what it raised
and beside a stopped step, where its progress is linear, "extrapolated": the seconds that the whole step would take.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import resource
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

STEP_LIMIT = 300
MEMORY_LIMIT = 16  # GiB; a peer that wants more gets an error instead of taking the machine down
Result = TypeVar("Result")


class StepStopped(BaseException):
    """Stop a step at its limit; no Exception, so that no peer's `except Exception` can swallow it."""


@dataclass(frozen=True)
class Options:
    """Hold one command line."""

    case: Path
    out: Path
    scores: Path | None
    step_limit: int
    memory_limit: int


@dataclass(frozen=True)
class Settings:
    """Hold case.json."""

    name: str
    model: str
    train: int
    tests: list[int]
    threads: int
    empirical: bool = False
    damping: float | None = None


@dataclass(frozen=True)
class Case:
    """Hold the tensors of a case: inputs [n, channels, height, width] float32 and targets [n] int64."""

    settings: Settings
    state: dict[str, Tensor]
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    second_x: Tensor
    second_y: Tensor

    def model(self) -> nn.Module:
        """Build the case's model anew, trained and in eval mode."""
        model = build_model(self.settings.model)
        model.load_state_dict(self.state)
        return model.eval()


@dataclass
class Log:
    """Collect what one peer did, and write it after every step."""

    options: Options
    record: dict[str, Any]
    folder: Path | None = None  # what the peer writes; its bytes are counted after each step
    done: int = 0
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self) -> None:
        """Write the record so far."""
        part = self.options.out.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1) + "\n")
        part.replace(self.options.out)

    def add(self, method: str, step: str, **entry: Any) -> None:
        """Append one step and write."""
        self.record["steps"].append({"method": method, "step": step, **entry})
        self.record["peak_bytes"] = peak_bytes()
        self.write()
        print(self.record["peer"], method, step, *(f"{key}={value}" for key, value in entry.items()), flush=True)

    def run(self, method: str, step: str, work: Callable[[], Result], *, total: int = 0, **extra: Any) -> Result | None:
        """Run and time one step under the limit; `total` is the count that `done` reaches when it is through.

        Returns:
            What the work returned, or None if it was stopped or failed.
        """
        self.done = 0
        result: Result | None = None
        entry: dict[str, Any] = {}
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(self.options.step_limit)
        started = time.perf_counter()
        try:
            result = work()
            signal.alarm(0)
            entry["seconds"] = round(time.perf_counter() - started, 4)
        except StepStopped:
            elapsed = time.perf_counter() - started
            entry["seconds"] = f"> {self.options.step_limit} s"
            if 0 < self.done < total:
                entry["extrapolated"] = round(elapsed * total / self.done, 1)
                entry["done"] = f"{self.done} of {total}"
        except Exception as error:
            entry["error"] = last_line(error)
        finally:
            signal.alarm(0)
        entry["peak_bytes"] = peak_bytes()
        if self.folder is not None:
            entry["disk_bytes"] = bytes_under(self.folder)
        self.add(method, step, **entry, **extra)
        return result

    def sum_fit(self, method: str) -> None:
        """Add the step "fit", the sum of the method's steps "fit/...", where all of them have seconds."""
        parts = [s for s in self.record["steps"] if s["method"] == method and s["step"].startswith("fit/")]
        if all(isinstance(part.get("seconds"), int | float) for part in parts):
            self.add(method, "fit", seconds=round(sum(part["seconds"] for part in parts), 4))

    def trouble(self, method: str, step: str) -> str | None:
        """Tell how the last run of a step ended: "stopped", "failed" or, if it has seconds, None."""
        found = [s for s in self.record["steps"] if s["step"] == step and s["method"] == method][-1]
        if "error" in found:
            return "failed"
        return "stopped" if isinstance(found["seconds"], str) else None

    def keep(self, **arrays: Tensor | np.ndarray) -> None:
        """Keep arrays for --scores, as float32, and write what there is."""
        for name, array in arrays.items():
            self.scores[name] = np.asarray(array.detach() if isinstance(array, Tensor) else array, np.float32)
        if self.options.scores is not None:
            np.savez(self.options.scores, **self.scores)


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """Give (x[i], y[i]) and count in log.done how many were asked for."""

    def __init__(self, x: Tensor, y: Tensor, log: Log) -> None:
        self.x, self.y, self.log = x, y, log

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.log.done += 1
        return self.x[index], self.y[index]


def _stop(_signal: int, _frame: Any) -> None:
    raise StepStopped


def last_line(error: BaseException) -> str:
    """Give an error as one line: its type and the last line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def peak_bytes() -> int:
    """Give the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bytes_under(folder: Path) -> int:
    """Give the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_model(name: str) -> nn.Module:
    """Build "cnn" (the demo's, 28×28 grey) or "resnet18" (torchvision's, ten classes)."""
    if name == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=10)
    if name != "cnn":
        raise ValueError(f"unknown model {name!r} in case.json; known: cnn, resnet18")
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def load_case(folder: Path) -> Case:
    """Read case.json, model.pt, train.npz and test.npz."""
    values = json.loads((folder / "case.json").read_text())
    settings = Settings(**{key: values[key] for key in Settings.__dataclass_fields__ if key in values})
    train, test = np.load(folder / "train.npz"), np.load(folder / "test.npz")
    state = torch.load(folder / "model.pt", weights_only=True)
    arrays = [train["x"], train["y"], test["x"], test["y"], test["x2"], test["y2"]]
    return Case(settings, state, *map(torch.from_numpy, arrays))


def start(peer: str, package: str, conventions: str) -> tuple[Case, Log]:
    """Read the command line and the case, set the threads, measure U and open the record."""
    parser = argparse.ArgumentParser(description=conventions)
    parser.add_argument("case", type=Path, metavar="CASE_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--scores", type=Path, metavar="OUT.npz", help="save scores [10, n] and self-influence [n]")
    parser.add_argument("--step-limit", type=int, default=STEP_LIMIT, metavar="SECONDS")
    parser.add_argument("--memory-limit", type=int, default=MEMORY_LIMIT, metavar="GIB")
    options = Options(**vars(parser.parse_args()))
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_limit << 30, options.memory_limit << 30))
    case = load_case(options.case)
    torch.set_num_threads(case.settings.threads)
    torch.manual_seed(0)
    model = case.model()
    record = {
        "peer": peer,
        "version": version(package),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "conventions": " ".join(conventions.split()),
        "case": asdict(case.settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": [],
    }
    log = Log(options, record)
    measure_unit(log, case, model)
    return case, log


def measure_unit(log: Log, case: Case, model: nn.Module) -> None:
    """Time U, one plain forward + backward over the training images in batches of 256 (a short one thrice).

    Not a step of the peer: every ratio is taken to it.
    """
    repeats = 3 if case.settings.model == "cnn" and len(case.x) <= 10_000 else 1
    parameters = list(model.parameters())

    def once() -> float:
        started = time.perf_counter()
        for x, y in zip(case.x.split(256), case.y.split(256), strict=True):
            torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), parameters)
            log.done += len(x)
        return time.perf_counter() - started

    seconds = log.run("torch", "warm-up", lambda: [once()], total=len(case.x))
    if seconds is None:
        return
    # The first pass pays for the thread pool and the allocator; of a large case one pass is enough all the same.
    if repeats > 1:
        seconds = [once() for _ in range(repeats)]
    log.add("torch", "U", seconds=round(statistics.median(seconds), 4), passes=len(seconds))


def run_tests(
    log: Log, case: Case, method: str, score: Callable[[Tensor, Tensor, str], Tensor], *, passes: int = 0
) -> None:
    """Time tests_1, tests_10, tests_100 and second_100, keeping the scores of 10.

    Args:
        score: Maps test inputs, test targets and a name for files to scores [tests, n].
        passes: How often `score` goes over the training images, where it counts them in log.done.
    """
    sets = [(f"tests_{count}", case.test_x[:count], case.test_y[:count]) for count in case.settings.tests]
    sets.append(("second_100", case.second_x, case.second_y))
    previous, trouble = "", None
    for step, x, y in sets:
        if trouble:
            # More test images take no less.
            outcome = {"seconds": f"> {log.options.step_limit} s"} if trouble == "stopped" else {"error": "not run"}
            log.add(method, step, **outcome, note=f"not run: {previous} {trouble}")
            continue
        scores = log.run(method, step, lambda x=x, y=y, step=step: score(x, y, step), total=len(case.x) * passes)
        previous, trouble = step, log.trouble(method, step)
        if scores is not None and len(x) == 10:
            log.keep(**{f"{method}_scores": scores})


def read_mosaic(path: Path) -> np.ndarray:
    """Read tiles uint8 [n, 32, 32, 3] of CIFAR-10 from a picture of them all, row by row."""
    from PIL import Image

    mosaic = np.asarray(Image.open(path).convert("RGB"))
    columns = mosaic.shape[1] // 32
    return mosaic.reshape(-1, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def read_fashion_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images [n, 28, 28] uint8 and labels [n] uint8 of "train" or "t10k" from gzip IDX files."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels
