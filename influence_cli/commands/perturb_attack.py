"""What `influence perturb` does with --attack and --attackable."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.errors import InfluenceError, counted
from influence_cli.results.perturb_rows import ATTACK_COLUMNS, ATTACKABLE_COLUMNS, attack_row
from influence_cli.results.record import AttackRecord

if TYPE_CHECKING:
    from influence_cli.model.task import Task
    from influence_cli.perturb.attack import Attack
    from influence_cli.perturb.eight_bit import PixelScale
    from influence_cli.results.run import Session
    from influence_cli.retrain.top_layer import TopLayer

ONE = "an attack needs exactly one checkpoint"


@dataclass(frozen=True)
class AttackOptions:
    """The options: the words of --test, one image or how many, rounds, the folder, the pixel scale, rows to show."""

    tests: list[str]
    index: int | None
    images: int
    rounds: int
    folder: Path
    pixels: tuple[str | None, str | None]
    count: int | None


def run_attack(session: Session, options: AttackOptions) -> None:
    """Attack every selected test prediction, one after another."""
    from influence_cli.metrics import binomial_interval
    from influence_cli.model.task import only_task
    from influence_cli.perturb.attack import attack_prediction, check_attack
    from influence_cli.perturb.inputs import read_training_image
    from influence_cli.results.session import emit, load
    from influence_cli.retrain.top_layer import top_layer

    task = only_task(load(session), ONE)
    if options.index is not None:
        read_training_image(task, options.index)
    if options.index is None and options.images > len(task.train):
        raise InfluenceError(f"--images {options.images}: there are only {len(task.train):,} training examples")
    folder = _made(options.folder)
    scale = _scale(task, options.pixels)
    positions = _positions(task, session, options.tests)
    top = top_layer(task, session.terminal)
    check_attack(top, scale)
    rows = _right(session, top, positions, options.tests)
    done: list[Attack] = []

    def attacks() -> Iterator[dict[str, object]]:
        images = options.images if options.index is None else [options.index]
        with session.terminal.progress(len(rows), "attacking") as advance:
            for row in rows:
                attack = attack_prediction(top, row, scale, images=images, rounds=options.rounds)
                _write(folder, scale, attack)
                done.append(attack)
                advance(1)
                yield attack_row(task, attack)
        flipped = sum(one.flipped for one in done)
        low, high = binomial_interval(flipped, len(done))
        # Noted here, because the run file is written with the last row.
        session.run.attack = AttackRecord(len(done), flipped, low, high)

    emit(session, attacks(), ATTACK_COLUMNS)
    _tell(session, done, folder)


def run_attackable(session: Session, options: AttackOptions) -> None:
    """Rank the test predictions that a single training image could flip."""
    from influence_cli.data.split import rows_of
    from influence_cli.model.task import only_task
    from influence_cli.perturb.attack import check_attack, rank_attackable
    from influence_cli.results.session import emit, load
    from influence_cli.retrain.top_layer import top_layer

    task = only_task(load(session), ONE)
    scale = _scale(task, options.pixels)
    positions = _positions(task, session, options.tests) if options.tests else task.labelled_tests().indices.tolist()
    top = top_layer(task, session.terminal)
    check_attack(top, scale)
    rows = rows_of(top.test_indices, positions).tolist()
    attackable = rank_attackable(top, rows, scale, session.terminal)
    could = sum(one.ratio >= 1 for one in attackable)
    session.run.attackable = could
    classes = task.classes
    emit(
        session,
        (
            {
                "rank": rank,
                "test": one.test,
                "test_path": task.test_split().path(one.test),
                "test_label": classes[one.label],
                "other": classes[one.other],
                "margin": one.margin,
                "index": one.image,
                "path": task.train.path(one.image),
                "gain": one.gain,
                "ratio": one.ratio,
            }
            for rank, one in enumerate(attackable[: options.count], start=1)
        ),
        ATTACKABLE_COLUMNS,
    )
    wrong = len(rows) - len(attackable)
    session.terminal.say(
        f"one training image could flip {could:,} of {len(attackable):,} correct test predictions (ratio ≥ 1)"
        + (f"; {wrong:,} are already wrong" if wrong else "")
    )
    if attackable:
        session.terminal.say(f"next: influence perturb --attack --test {attackable[0].test} attacks the first one")


def _scale(task: Task, pixels: tuple[str | None, str | None]) -> PixelScale:
    from influence_cli.perturb.eight_bit import given_scale, pixel_scale

    return pixel_scale(task.train) if pixels[0] is None else given_scale(pixels[0], pixels[1])


def _positions(task: Task, session: Session, words: list[str]) -> list[int]:
    from influence_cli.results.session import selected_tests

    positions = []
    for item in selected_tests(session, [task], words):
        if item.index is None:
            raise InfluenceError(
                f"{item.file} is a file without a label, and an attack needs the label",
                "give positions of the test set",
            )
        positions.append(item.index)
    return positions


def _right(session: Session, top: TopLayer, positions: Sequence[int], words: list[str]) -> list[int]:
    """Give the rows of test examples that are predicted correctly. It is an error if a named one is not."""
    from influence_cli.perturb.attack import right_row

    named = {int(word) for word in words if re.fullmatch(r"\d+", word, re.ASCII)}
    rows, wrong, last = [], 0, None
    for position in dict.fromkeys(positions):
        try:
            rows.append(right_row(top, position))
        except InfluenceError as error:
            if position in named:
                raise
            wrong, last = wrong + 1, error
    if not rows and last is not None:
        raise last
    if wrong:
        session.terminal.say(f"skipped {counted(wrong, 'test example')} that the model already gets wrong")
    return rows


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from influence_cli.runtime.outputs import unwritable

        raise unwritable(folder, error) from error
    return folder


def _write(folder: Path, scale: PixelScale, attack: Attack) -> None:
    from influence_cli.perturb.files import write_image

    for index, x in zip(attack.images, attack.inputs, strict=True):
        write_image(folder, f"test{attack.test:05d}_train{index:07d}", scale, x)


def _tell(session: Session, done: Sequence[Attack], folder: Path) -> None:
    say, attack, one = session.terminal.say, session.run.attack, done[0]
    if attack is not None and len(done) > 1:
        share = f"{attack.flipped / len(done):.0%}, {attack.low:.0%} to {attack.high:.0%}"
        say(f"{attack.flipped:,} of {len(done):,} test predictions flipped ({share})")
    elif one.flipped:
        say(
            f"the prediction flipped after {counted(one.rounds, 'round')}; "
            f"{counted(one.flips, 'test prediction')} changed in all"
        )
    else:
        say(f"the prediction did not flip in {counted(one.rounds, 'round')}; try --images 10 to change more images")
    say(
        f"wrote {counted(sum(len(one.images) for one in done), 'image')} to {folder}/ (float32 .npy and 16-bit PNG); "
        "every pixel is within half an 8-bit level of the original, so an 8-bit copy undoes the attack"
    )
