"""`Debugger`: the commands `mislabels` and `rank` on objects that a notebook already has.

The objects take the place of what a config names (handed.py), and from there on everything is the commands' own path:
tasks, evidence, store, ranking, page.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_cli.commands.labels.features import load_features
from influence_cli.curvature.choice import SOLVERS
from influence_cli.errors import InfluenceError
from influence_cli.influence.example_facts import training_facts
from influence_cli.influence.test_gradients import check_target
from influence_cli.mislabels.find import Mislabels, find_mislabels
from influence_cli.mislabels.signals import GRADIENTS, SignalChoice, wanted_signals
from influence_cli.model.task import set_precision
from influence_cli.notebook.handed import Handed, examples_of, handing
from influence_cli.notebook.results import LabelSuspects, Ranking
from influence_cli.notebook.settings import HANDED, config_of, in_python, loss_section
from influence_cli.pages.mislabels import issues_record, mislabels_page, noise_record
from influence_cli.pages.overview import Collected
from influence_cli.pages.parts import SHOWN
from influence_cli.pages.rank import rank_page
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.copies import warn_of_copies
from influence_cli.ranking.rank import RankedGroup, RankOptions, rank_training
from influence_cli.replay.prepare import prepare_scores, stores_complete
from influence_cli.report.html import Page
from influence_cli.results.label_records import EvidenceRecord
from influence_cli.results.mislabel_rows import mislabel_rows
from influence_cli.results.rank_rows import rank_rows
from influence_cli.results.record import RunRecord
from influence_cli.results.run import Session
from influence_cli.results.session import load, prepare, selected_tests
from influence_cli.runtime.terminal import Terminal


class Debugger:
    """Finds wrong labels, and the training images behind a prediction, for a model and its data.

    The model and its data are looked at when the object is made: a mistake in them shows there. The model is copied, so
    that a training that goes on later changes nothing here, and nothing here changes the model.

    Args:
        model: the trained network; one row of logits per image.
        train: the training examples, with the transform of evaluation: a data set with ``__len__`` and ``__getitem__``
            that gives (input, class number), or a DataLoader of one. Indices count its items in their own order.
        test: the test examples, likewise; ``rank`` needs them.
        loss: a name (``cross_entropy``), a loss of torch, or a function (outputs, targets) to [batch].
        classes: the name of every output of the model; otherwise those of ``train.classes``, or numbers.
        l2: λ₂ of λ₂/2·‖θ‖² beside the mean loss: for SGD its ``weight_decay``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        method: ``curvature.method`` of a config: ``auto``, ``ekfac``, ``identity`` and others (docs/influence.md).
        damping: λ, ``auto`` or a number.
        store: a file that keeps the gradients of ``rank`` for another session; otherwise they are temporary.
        settings: other keys of a config, such as ``{"gradients.layers": ["fc.*"]}`` (docs/config.md).
        quiet: print only warnings.

    Raises:
        InfluenceError: in one line, what does not fit: a data set without a length, labels that are no class numbers,
            outputs that are not one row of logits per image.
    """

    def __init__(
        self,
        model: nn.Module,
        train: object,
        test: object | None = None,
        *,
        loss: str | Callable[..., Any] = "cross_entropy",
        classes: Sequence[str] | None = None,
        l2: float | Mapping[str, float] = 0.0,
        device: str = "auto",
        method: str | None = None,
        damping: float | str | None = None,
        store: str | Path | None = None,
        settings: Mapping[str, object] | None = None,
        quiet: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InfluenceError(
                f"the model: a {type(model).__name__} is not a torch module", "give the trained nn.Module itself"
            )
        section, own = loss_section(loss)
        tests = None if test is None else examples_of(test, "test")
        handed = Handed(model, own, examples_of(train, "train"), tests)
        given = {
            "l2": l2 if isinstance(l2, float | int) else dict(l2),
            "device": device,
            "curvature.method": method,
            "curvature.damping": damping,
            "gradients.store": self._store(store),
        }
        config = config_of(handed, section, classes=classes, values=given | dict(settings or {}), folder=Path.cwd())
        self._session = Session(config, Terminal(quiet=quiet), "table", None)
        self._name = type(model).__name__
        with _as_found(), handing(handed), _told():
            self._tasks = load(self._session)

    def _store(self, given: str | Path | None) -> Path:
        if given is not None:
            return Path(given).absolute()
        folder = tempfile.mkdtemp(prefix="influence-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder) / "influence.h5"

    @property
    def classes(self) -> tuple[str, ...]:
        """Give the name of every output of the model."""
        return self._tasks[0].classes

    def mislabels(self, *, signal: str = "combined", on: str = "train") -> LabelSuspects:
        """Rank the labels by how suspicious they are, as ``influence mislabels`` does.

        Args:
            signal: what to rank by (docs/mislabels.md); the default takes one forward pass.
            on: ``train`` or ``test``.

        Raises:
            InfluenceError: there is no such set or signal, or the signal is not available here.
        """
        if on not in ("train", "test"):
            raise InfluenceError(f"on={on!r}: there is no such set", "known: train, test")
        session, tasks = self._begun(), self._tasks
        task, config = tasks[0], session.config
        with _as_found(), _told():
            split = task.train if on == "train" else task.labelled_tests()
            features = load_features(config, task, split, (), session.terminal, skip=False)
            wanted = wanted_signals(
                signal,
                extent="one",
                on=on,
                checkpoints=len(tasks),
                tests=task.test is not None and not task.test.is_unlabelled,
                solves=config.curvature.method in (*SOLVERS, "replay"),
                probabilities=False,
                features=features,
            )
            stores = self._stores(session, signal)
            labels = find_mislabels(
                tasks,
                stores,
                on=on,
                choice=SignalChoice(signal, wanted, features=features),
                terminal=session.terminal,
                store=config.gradients.store,
            )
        session.run.scores, session.run.issues = labels.scores, issues_record(labels, split, task.classes)
        session.run.evidence = EvidenceRecord(labels.evidence.summary, labels.evidence.memorised)
        if labels.noise is not None:
            session.run.noise = noise_record(labels, labels.noise, task.classes)

        def page(count: int) -> Page:
            from influence_cli.report.html import MAX_BYTES

            made = mislabels_page(session, tasks, stores, labels, split, count, signal, MAX_BYTES)
            return self._named(made, f"mislabels(signal={signal!r}, on={on!r})")

        rows = tuple(mislabel_rows(labels, split, task.classes, len(labels.order)))
        return LabelSuspects(rows, _summary(labels), labels, page)

    def rank(self, *tests: int | str | Path, target: str = "label", top: int = 10, aggregate: bool = False) -> Ranking:
        """Rank the training images by their influence on test examples, as ``influence rank`` does.

        Args:
            tests: positions in the test set, or the words of the command: ``misclassified``, ``0:5``, an image file.
            target: whose loss is explained: ``label``, ``predicted``, or a class name.
            top: images per list, helpful and harmful.
            aggregate: explain the mean loss of all of them.

        Raises:
            InfluenceError: there is no such test example or class, or no test set.
        """
        if not tests:
            raise InfluenceError("rank: say which test images to explain", "rank(17), or rank('misclassified')")
        if top < 1:
            raise InfluenceError(f"top={top}: expected a number of images, 1 or more", "top=10")
        session, tasks, classes = self._begun(), self._tasks, self._tasks[0].classes
        with _as_found(), _told():
            if tasks[0].test is None:
                raise InfluenceError("rank: there are no test examples", "Debugger(model, train, test)")
            check_target(target, classes)
            selected = selected_tests(session, tasks, [str(word) for word in tests], target=target)
            stores = prepare(session, tasks)
            warn_of_copies(stores, selected, session.terminal)
            facts = training_facts(stores)
            collected = Collected(1 if aggregate else min(len(selected), SHOWN), len(facts.indices))

            def ranked() -> Iterator[RankedGroup]:
                session.run.scores = yield from rank_training(
                    stores,
                    selected,
                    facts=facts,
                    count=top,
                    target=target,
                    aggregate=aggregate,
                    terminal=session.terminal,
                    options=RankOptions(sinks=[collected.held]),
                )

            groups = list(ranked())
            for group in groups:
                collected.take(group)

        def page(count: int, shown: int) -> Page:
            made = rank_page(session, stores, collected, facts, count, aggregate=aggregate)
            made = made if shown >= len(selected) else replace(made, sections=made.sections[:shown])
            return self._named(made, f"rank({', '.join(map(repr, tests))})")

        rows = tuple(row for group in groups for row in rank_rows(stores[0], group, facts, aggregate=aggregate))
        plain = tuple({name: value for name, value in row.items() if name != "normalised"} for row in rows)
        return Ranking(plain, len(selected), facts.indices, collected.held.values, page)

    def report(self, path: str | Path) -> Path:
        """Write the page of the suspicious labels.

        Args:
            path: a file that ends in .html.

        Returns:
            The path.
        """
        return self.mislabels().report(path)

    def _stores(self, session: Session, signal: str) -> Sequence[Prepared]:
        """Prepare the store that a signal needs; for the others take one that is there, for their self-influence."""
        if signal in GRADIENTS:
            return prepare_scores(session.config, self._tasks, session.terminal)
        try:
            if stores_complete(session.config):
                return prepare_scores(session.config, self._tasks, Terminal(quiet=True))
        except InfluenceError as error:  # such as a store of another run
            session.terminal.warn(f"no self_influence: {error.message}")
        return []

    def _begun(self) -> Session:
        return replace(self._session, run=RunRecord(), started=time.perf_counter())

    def _named(self, page: Page, call: str) -> Page:
        """Name the notebook's objects on a page, where a page of a command names factories and the command."""
        sentence = page.sentence.replace(f"{HANDED}.model from {HANDED}.model", self._name)
        return replace(page, sentence=sentence, command=f"Debugger(model, train, test).{call}")


def _summary(labels: Mislabels) -> str:
    if labels.noise is None:
        return f"The number of wrong labels is not estimated: {labels.doubt}." if labels.doubt else ""
    verb = "is" if labels.noise.count == 1 else "are"
    return f"About {labels.noise.count:,} of {len(labels.order):,} labels {verb} wrong ({labels.noise.rate:.1%})."


@contextmanager
def _told() -> Iterator[None]:
    """Tell mistakes in the words of Python."""
    try:
        yield
    except InfluenceError as error:
        raise in_python(error) from error


@contextmanager
def _as_found() -> Iterator[None]:
    """Give torch's random numbers and switches back to the notebook as they were."""
    fast = torch.backends.mha.get_fastpath_enabled()
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            # As load_tasks sets them: each call here may come after others have changed them.
            torch.backends.mha.set_fastpath_enabled(False)
            set_precision("float32")
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
