"""What several tests share: real data where it is there, a small real project, and the command line."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.support import fork_server
from tests.support.copies import copied
from tests.support.public_data import shared as shared  # for the tests

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator
    from playwright.sync_api import Page as Tab

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

CONFIG = """
model:
  factory: ./model.py:build
  checkpoint: model.pt
l2: 0.01
train:
  dataset: torchvision.datasets.ImageFolder
  args: {root: train}
  transform: [{Grayscale: {num_output_channels: 1}}, ToImage, {ToDtype: {dtype: float32, scale: true}}]
test:
  dataset: torchvision.datasets.ImageFolder
  args: {root: test}
gradients: {block: 64}
"""
MODEL = """
from torch import nn


def build():
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))
"""


def run_influence(
    *words: str | Path, cwd: Path, stdin: str | None = None, code: int = 0, hook: tuple[object, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, a fork of fork_server.py, and check its exit code."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    done = fork_server.run(
        [sys.executable, "-m", "influence_cli", *map(str, words)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        hook=hook,
    )
    assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the cases that ``pytest.mark.quick`` does not name to ``make test-slow``."""
    for item in items:
        mark = item.get_closest_marker("quick")
        case = item.name.partition("[")[2].removesuffix("]")
        if mark is not None and not any(fnmatch.fnmatchcase(case, pattern) for pattern in mark.args):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def one_parser_and_speed(one_thread: None) -> None:
    """Build the parser and measure this machine once, not for every command that runs in this process."""
    fork_server.keep_parser_and_speed()
    gc.freeze()  # torch's objects need not be looked through again


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Take one thread: the matrices here are small, and threads that wait for each other cost more than they give."""
    torch.set_num_threads(1)


@dataclass
class Ended:
    """How a command ended in this process."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def influence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process: ``influence("rank", 3, cwd=folder, code=2)``."""
    from influence_cli.cli import app

    def run(*words: object, cwd: Path, code: int = 0, stdin: str = "") -> Ended:
        import io

        monkeypatch.chdir(cwd)
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.delenv("INFLUENCE_CONFIG", raising=False)
        capsys.readouterr()
        try:
            app([str(word) for word in words])
            ended = 0
        except SystemExit as exit_:
            ended = int(exit_.code or 0)
        captured = capsys.readouterr()
        assert ended == code, f"{words} ended with {ended}\n{captured.out[-2000:]}\n{captured.err}"
        assert "Traceback" not in captured.err
        return Ended(ended, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of 320 + 80 real images and a softmax regression trained to its minimum; do not change it."""
    return make_project(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def stored(one_thread: None, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a complete store; do not change it."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("stored") / "project"))
    # In this process, with its one thread: eigenvectors of two threads differ in the last bit.
    from influence_cli.cli import app

    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        app(["gradients", "-q"])
    assert not ended.value.code
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the project that a test may change."""
    with copied(trained, tmp_path / "project") as folder:
        yield folder


@pytest.fixture(scope="session")
def small_made(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of tests/support/small_project.py, without a store; do not change it."""
    from tests.support.small_project import make

    return make(tmp_path_factory.mktemp("small") / "project")


@pytest.fixture
def tiny(small_made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the project of tests/support/small_project.py that a test may change."""
    with copied(small_made, tmp_path / "project") as folder:
        yield folder


def edit(project: Path, old: str, new: str) -> None:
    """Change a line of a project's config."""
    path = project / "influence.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def make_project(folder: Path, train: int = 320, test: int = 80) -> Path:
    """Write images of the demo as an ImageFolder, and train a softmax regression on 7×7 means to its minimum."""
    from influence_cli.demo.project import CLASSES, TRAIN, read_images

    images, labels = read_images()
    for part, start, count in (("train", 0, train), ("test", TRAIN, test)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
        for position in range(start, start + count):
            path = folder / part / CLASSES[labels[position]] / f"{position:05d}.png"
            Image.fromarray(images[position]).save(path)
    (folder / "influence.yaml").write_text(CONFIG)
    (folder / "model.py").write_text(MODEL)
    save_minimum(folder)
    return folder


def save_minimum(folder: Path, l2: float = 0.01, labels: np.ndarray | None = None) -> None:
    """Train the softmax regression of a project in float64 until the gradient is zero to rounding, and save it."""
    from torchvision.datasets import ImageFolder

    data = ImageFolder(folder / "train")
    x = torch.stack([torch.tensor(np.array(image.convert("L"))).double() / 255 for image, _ in data])
    x = nn.functional.avg_pool2d(x[:, None], 4).flatten(1)
    y = torch.tensor(data.targets if labels is None else labels)
    model = nn.Linear(49, 10, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        loss = nn.functional.cross_entropy(model(x), y) + l2 / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    state = {"2.weight": model.weight.detach().float(), "2.bias": model.bias.detach().float()}
    torch.save(state, folder / "model.pt")


@dataclass
class Demo:
    """What `influence demo` left: its folder and what it printed."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo with a quarter of its images, run once, by one of the processes that test at a time; do not change it.

    tests/demo runs all of it as a user would.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "demo"
    folder.mkdir(exist_ok=True)
    out, err = folder / "out", folder / "err"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not err.exists():
            done = run_influence("demo", "project", cwd=folder, hook=("be_small_demo",))
            out.write_text(done.stdout)
            err.write_text(done.stderr)
    return Demo(folder / "project", out.read_text(), err.read_text())


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A writable root with MNIST unpacked, as torchvision.datasets.MNIST takes it."""
    from torchvision.datasets import MNIST

    return unpack(tmp_path_factory.mktemp("mnist"), shared("mnist") / "MNIST", MNIST)


def unpack(root: Path, source: Path, dataset: type) -> Path:
    """Copy the original files to a writable folder and let torchvision unpack them."""
    shutil.copytree(source, root / source.name, copy_function=shutil.copyfile)
    for folder in (root / source.name, root / source.name / "raw"):
        folder.chmod(0o755)
    dataset(root, download=True)
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("INFLUENCE_TEST_BROWSER") == "required":
            pytest.fail("no Chromium here, and INFLUENCE_TEST_BROWSER requires it")
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Opened:
    """A page in a tab, and what went wrong in it."""

    tab: Tab
    problems: list[str]

    def card(self, index: int) -> Locator:
        return self.tab.locator(f'li[data-index="{index}"]').first

    def decided(self, index: int) -> str:
        return self.card(index).locator(".decided").inner_text()

    def status(self) -> str:
        return self.tab.locator("#status").inner_text()

    def progress(self) -> str:
        return self.tab.locator("#decided").inner_text()

    def focused(self) -> str | None:
        found: str | None = self.tab.evaluate("document.activeElement.dataset.index ?? null")
        return found

    def export(self) -> str:
        with self.tab.expect_download() as waiting:
            self.tab.click("#export")
        assert waiting.value.suggested_filename == "decisions.csv"
        return Path(waiting.value.path()).read_bytes().decode("utf-8")

    def load(self, text: str, tmp_path: Path) -> str:
        path = tmp_path / "decisions.csv"
        path.write_bytes(text.encode())
        before = self.status()
        self.tab.set_input_files("#file", path)
        self.tab.wait_for_function("before => document.getElementById('status').innerText !== before", arg=before)
        return self.status()


Visit = Callable[[Path], Opened]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a file with the network off; at the end nothing may have gone wrong in it."""
    context = browser.new_context(offline=True, viewport={"width": 1000, "height": 900})
    problems: list[str] = []

    def open_(path: Path) -> Opened:
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        tab.on(
            "request",
            lambda request: None if request.url[:5] in ("file:", "data:", "blob:") else problems.append(request.url),
        )
        tab.goto(path.as_uri())
        return Opened(tab, problems)

    yield open_
    context.close()
    assert problems == []
