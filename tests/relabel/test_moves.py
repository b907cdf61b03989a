"""Files are moved to the folders of their classes, each step logged: a kill anywhere can be continued or undone."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_cli.config.load import load_config
from influence_cli.relabel import move_log
from influence_cli.relabel.labels import apply_decisions
from influence_cli.relabel.move_log import LoggedBatch, last_open, open_log, read_log
from influence_cli.relabel.moves import apply_plan, continue_moves, plan_moves, undo_moves
from influence_cli.runtime import disk
from tests.conftest import Command, edit
from tests.support.relabel_project import decide, listing, make, tree

DECIDED = (
    (0, "relabel", "emoji 🦉"),
    (1, "relabel", 'a "quoted", one'),
    (6, "relabel", "-minus"),
    (9, "drop"),
    (12, "keep"),
    (22, "relabel", "=SUM(A1)"),
    (23, "drop"),
)


class Killed(BaseException):
    """What a kill is in a test: nothing of ours catches it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, *, torn: bool = False) -> Callable[[], None]:
    """Let the process die before its given step: every row of the log, folder made, link and unlink is one.

    Returns:
        A function that lets everything live again.
    """
    count = 0

    def die(torn_write: Callable[[], object] | None = None) -> None:
        nonlocal count
        count += 1
        if count == step:
            if torn_write is not None and torn:
                torn_write()
            raise Killed

    own = {name: getattr(disk, name) for name in ("append", "link", "unlink", "make_folder", "remove_folder")}

    def dying(name: str) -> Callable[..., None]:
        def do(*args: Any) -> None:
            torn_write = None if name != "append" else lambda: own[name](args[0], args[1][: len(args[1]) // 2])
            die(torn_write)
            own[name](*args)

        return do

    def set_all(functions: dict[str, Callable[..., None]]) -> None:
        for name, function in functions.items():
            monkeypatch.setattr(disk, name, function)

    set_all({name: dying(name) for name in own})
    return lambda: set_all(own)


def expected_tree(before: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Say what the moves of DECIDED come to."""
    after = dict(before)
    names = sorted({Path(path).name for path, content in before.items() if content is not None})
    first, second, third, fourth = names

    def move(source: str, target: str) -> None:
        after[target] = after.pop(source)

    def twice(name: str) -> str:
        return f"{Path(name).stem}-2.png"

    move(f"train/-minus/{first}", f"train/emoji 🦉/{twice(first)}")
    move(f"train/-minus/{second}", f'train/a "quoted", one/{twice(second)}')
    move(f"train/=SUM(A1)/{third}", f"train/-minus/{twice(third)}")
    after |= {"dropped": None, 'dropped/a "quoted", one': None, "dropped/עברית": None}
    move(f'train/a "quoted", one/{second}', f'dropped/a "quoted", one/{second}')
    move(f"train/עברית/{third}", f"train/=SUM(A1)/{twice(third)}")
    move(f"train/עברית/{fourth}", f"dropped/עברית/{fourth}")
    return dict(sorted(after.items()))


def test_files_move_to_their_classes_and_back(folder: Path, influence: Command) -> None:
    before, labels = tree(folder), dict(listing(folder))
    decide(folder, *DECIDED)
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    assert tree(folder) == expected_tree(before)
    moves = [json.loads(line) for line in done.out.splitlines()]
    assert len(moves) == 6
    assert all(move["from"] in labels and Path(move["to"]).is_file() for move in moves)
    assert "moved 6 files, listed in moves.log.csv; influence relabel --undo moves.log.csv moves them back" in done.err
    assert "4 file names already taken in the new folder: a number was added, as in =1+1-2.png" in done.err
    assert "moved 2 dropped files to data/dropped" in done.err
    assert "positions have changed" in done.err
    # The folders are the labels: no label file that would be applied on top.
    assert not (folder / "labels.csv").exists()
    assert not (folder / "exclude.csv").exists()
    assert dict(listing(folder))[moves[0]["to"]] == "emoji 🦉"
    done = influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == before
    assert "undid 6 moves of moves.log.csv (run 1, by decisions.csv)" in done.err
    assert [json.loads(line)["to"] for line in done.out.splitlines()] == [move["from"] for move in reversed(moves)]
    done = influence("relabel", "--undo", cwd=folder, code=2)
    assert "moves.log.csv: nothing is left to undo" in done.err
    # And once more, as a run of its own.
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    assert tree(folder) == expected_tree(before)
    assert [batch.state for batch in read_log(folder / "moves.log.csv")] == ["undone", "applied"]


def planned(folder: Path) -> Callable[[], LoggedBatch]:
    """Plan the moves of DECIDED once, and give what makes them or goes on with them, as the command does."""
    decisions, log = decide(folder, *DECIDED), folder / "moves.log.csv"
    plan = plan_moves(apply_decisions(load_config(folder / "influence.yaml"), decisions))

    def run() -> LoggedBatch:
        with open_log(log) as held:
            batch = last_open(read_log(log))
            return apply_plan(held, plan, decisions) if batch is None else continue_moves(held, batch)

    return run


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("then", ["go on", "undo"])
@pytest.mark.quick("go on-True", "undo-True")
def test_a_kill_at_any_step_can_be_continued_or_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, torn: bool, then: str
) -> None:
    before, run, log = tree(folder), planned(folder), folder / "moves.log.csv"
    died = 0
    for step in range(1, 60):
        live = kill_at(monkeypatch, step, torn=torn)
        try:
            run()
            break
        except Killed:
            died += 1
        finally:
            live()
        if then == "go on" or last_open(read_log(log)) is None:
            run()
            assert tree(folder) == expected_tree(before), step
        undo_moves(log)
        assert tree(folder) == before, step
        log.unlink()
    # Header, plan, three folders with a row each, six moves of two steps with two rows each, the end.
    assert died == 2 + 2 * 3 + 4 * 6 + 1
    assert tree(folder) == expected_tree(before)


@pytest.mark.parametrize("torn", [False, True])
def test_an_undo_that_is_killed_at_any_step_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    before, run, log = tree(folder), planned(folder), folder / "moves.log.csv"
    died = 0
    for step in range(1, 60):
        run()
        live = kill_at(monkeypatch, step, torn=torn)
        try:
            undo_moves(log)
            break
        except Killed:
            died += 1
        finally:
            live()
        undo_moves(log)
        assert tree(folder) == before, step
        log.unlink()
    # The row that begins it, six moves of two steps with a folder looked at and a row each, three folders, the end.
    assert died == 1 + 4 * 6 + 3 + 1
    assert tree(folder) == before


def test_between_an_undo_that_was_cut_off_nothing_is_applied(
    folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder)
    planned(folder)()
    live = kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        undo_moves(folder / "moves.log.csv")
    live()
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=2)
    assert "undoing moves was interrupted" in done.err
    assert "first run: influence relabel --undo" in done.err
    influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == before


def test_a_failure_half_way_says_how_to_go_on(
    folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, link = tree(folder), os.link
    decide(folder, *DECIDED)

    def full(source: str, target: str, **more: bool) -> None:
        if "dropped" in target:
            raise OSError(28, "No space left on device")
        link(source, target, **more)

    monkeypatch.setattr(os, "link", full)
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=2)
    assert "3 of 6 files are moved, then: OSError: [Errno 28] No space left on device" in done.err
    assert "run the same command to resume, or undo: influence relabel --undo moves.log.csv" in done.err
    # Between the two nothing else is made of the decisions.
    done = influence("relabel", "decisions.csv", cwd=folder, code=2)
    assert "moves.log.csv: moves by decisions.csv were interrupted" in done.err
    (folder / "other.csv").write_text("index,label,decision\n")
    done = influence("relabel", "other.csv", "--apply-moves", cwd=folder, code=2)
    assert "first resume: influence relabel decisions.csv --apply-moves" in done.err
    monkeypatch.setattr(os, "link", link)
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    assert "unfinished moves from an interrupted run: finishing them" in done.err
    assert tree(folder) == expected_tree(before)


def test_ctrl_c_says_how_many_are_moved(folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    link, count = os.link, 0
    decide(folder, *DECIDED)

    def stop(source: str, target: str, **more: bool) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        link(source, target, **more)

    monkeypatch.setattr(os, "link", stop)
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=130)
    assert (
        "interrupted: 2 of 6 files are moved; run the same command to resume, "
        "or undo: influence relabel --undo moves.log.csv" in done.err
    )


def test_decisions_from_before_the_moves_are_refused(folder: Path, influence: Command) -> None:
    decide(folder, *DECIDED)
    decide(folder, (3, "drop"), (20, "relabel", "plain"), name="others.csv")
    influence("relabel", "others.csv", cwd=folder)
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    for words in ([], ["--apply-moves"]):
        done = influence("relabel", "decisions.csv", *words, cwd=folder, code=2)
        assert "decisions.csv was already applied: its 6 files were moved on 20" in done.err
    done = influence("relabel", "others.csv", "--force", cwd=folder, code=2)
    assert "others.csv:2: stale: index 3 is " in done.err
    assert "files were moved on 20" in done.err
    assert "see moves.log.csv (influence relabel --undo moves.log.csv)" in done.err
    # So are the label files from before.
    words = ["-s", "train.labels=labels.csv", "-s", "train.exclude=exclude.csv"]
    decide(folder, (0, "keep"), name="now.csv")
    done = influence("relabel", "now.csv", "--force", *words, cwd=folder, code=2)
    assert "exclude.csv:2: index 3 is " in done.err
    # Without paths nothing can be known.
    for text in ("index,label,decision\n0,-minus,keep\n", "index,path,label,decision\n0,,-minus,keep\n"):
        (folder / "bare.csv").write_text(text)
        done = influence("relabel", "bare.csv", "--force", cwd=folder, code=2)
        assert "error: files were moved on" in done.err
        assert "add the column path, or run influence relabel --undo moves.log.csv first" in done.err


def test_label_files_of_the_config_do_not_go_with_moves(folder: Path, influence: Command) -> None:
    before = tree(folder)
    decide(folder, (0, "relabel", "plain"), (1, "drop"))
    influence("relabel", "decisions.csv", cwd=folder)
    edit(folder, "{root: data/train}}", "{root: data/train}, labels: labels.csv, exclude: exclude.csv}")
    decide(folder, (4, "relabel", "plain"), name="more.csv")
    done = influence("relabel", "more.csv", "--apply-moves", cwd=folder, code=2)
    assert "influence.yaml:3: train.labels cannot be used with moves" in done.err
    assert "give it this once so that it moves too: -s train.labels=labels.csv" in done.err
    assert tree(folder) == before
    edit(folder, ", labels: labels.csv, exclude: exclude.csv}", "}")
    words = ["-s", "train.labels=labels.csv", "-s", "train.exclude=exclude.csv"]
    done = influence("relabel", "more.csv", "--apply-moves", *words, cwd=folder)
    assert "moved 3 files" in done.err
    assert len(list((folder / "data" / "train" / "plain").iterdir())) == 6
    assert len(list((folder / "data" / "dropped" / "-minus").iterdir())) == 1


def test_a_second_run_is_undone_before_the_first(folder: Path, influence: Command) -> None:
    before = tree(folder)
    decide(folder, (0, "relabel", "plain"))
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    between = tree(folder)
    decide(folder, (0, "drop"))
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    done = influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == between
    assert "--undo again undoes run 1: 1 move" in done.err
    influence("relabel", "--undo", "moves.log.csv", cwd=folder)
    assert tree(folder) == before


def moved(folder: Path, influence: Command) -> tuple[Path, Path]:
    """Move one file, and give its place before and after."""
    decide(folder, (0, "relabel", "plain"), (1, "drop"))
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    first = json.loads(done.out.splitlines()[0])
    return Path(first["from"]), Path(first["to"])


def change(source: Path, target: Path) -> None:
    target.write_bytes(b"another")


def take(source: Path, target: Path) -> None:
    source.write_bytes(b"another")


def remove(source: Path, target: Path) -> None:
    target.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [(change, "has changed since its move was logged"), (take, "both data/"), (remove, "neither data/")],
)
def test_an_undo_refuses_what_has_changed_and_moves_nothing(
    folder: Path, influence: Command, what: Callable[[Path, Path], None], message: str
) -> None:
    places = moved(folder, influence)
    what(*places)
    before, log = tree(folder), (folder / "moves.log.csv").read_bytes()
    done = influence("relabel", "--undo", cwd=folder, code=2)
    assert message in done.err
    assert tree(folder) == before
    assert (folder / "moves.log.csv").read_bytes() == log


def test_no_file_is_ever_overwritten(folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something takes the place between the check and the rename."""
    add = move_log.MoveLog.add

    def add_and_take(self: move_log.MoveLog, batch: int, move: int, event: str, source: str = "", target: str = "",
                     hash: str = "") -> None:  # fmt: skip
        add(self, batch, move, event, source, target, hash)
        if event == "move":
            Path(target).write_bytes(b"mine")

    monkeypatch.setattr(move_log.MoveLog, "add", add_and_take)
    decide(folder, (0, "relabel", "plain"))
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=2)
    assert "0 of 1 files are moved, then: FileExistsError" in done.err
    assert (folder / "data" / "train" / "plain" / "=1+1-2.png").read_bytes() == b"mine"


def test_two_files_of_one_name_get_two_names(folder: Path, influence: Command) -> None:
    """The names in the new folder are promised one after another: both files bear a name that is taken there."""
    before = tree(folder)
    known = listing(folder)
    first = next(i for i, (_, label) in enumerate(known) if label == "-minus")
    second = next(i for i, (path, label) in enumerate(known) if label == "plain" and same_name(path, known[first][0]))
    decide(folder, (first, "relabel", "emoji 🦉"), (second, "relabel", "emoji 🦉"))
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    name = Path(known[first][0])
    there = {path.name for path in (folder / "data" / "train" / "emoji 🦉").iterdir()}
    assert {name.name, f"{name.stem}-2{name.suffix}", f"{name.stem}-3{name.suffix}"} <= there
    influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == before


def same_name(one: str, other: str) -> bool:
    return Path(one).name == Path(other).name


def test_a_class_folder_is_not_left_empty(folder: Path, influence: Command) -> None:
    before = tree(folder)
    decide(folder, *((index, "drop") for index in range(4)))
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=2)
    assert "would leave the class folder -minus empty" in done.err
    assert tree(folder) == before
    assert not (folder / "moves.log.csv").exists()
    influence("relabel", "decisions.csv", cwd=folder)


def test_a_relative_link_that_would_break_is_refused(folder: Path, influence: Command) -> None:
    first = Path(listing(folder)[0][0])
    (folder / "data" / "train" / "-minus" / "deep").mkdir()
    (first.parent / "deep" / "link.png").symlink_to("../" + first.name)
    number = next(i for i, (path, _) in enumerate(listing(folder)) if path.endswith("link.png"))
    decide(folder, (number, "relabel", "plain"))
    before = tree(folder)
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=2)
    assert "is a relative link" in done.err
    assert tree(folder) == before


def test_folders_below_a_class_are_kept(folder: Path, influence: Command) -> None:
    before_all = tree(folder)
    first = Path(listing(folder)[0][0])
    (first.parent / "deep").mkdir()
    first.rename(first.parent / "deep" / "new.png")
    number = next(i for i, (path, _) in enumerate(listing(folder)) if path.endswith("new.png"))
    decide(folder, (number, "relabel", "plain"))
    before = tree(folder)
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    assert (folder / "data" / "train" / "plain" / "deep" / "new.png").is_file()
    influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == before != before_all


def test_nothing_to_move_is_said(folder: Path, influence: Command) -> None:
    decide(folder, (0, "keep"))
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    assert "there is nothing to move" in done.err
    assert not (folder / "moves.log.csv").exists()


def test_a_log_that_was_edited_is_refused(folder: Path, influence: Command) -> None:
    moved(folder, influence)
    log = folder / "moves.log.csv"
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b'"moved"', b'"Moved"', 1))
    done = influence("relabel", "--undo", cwd=folder, code=2)
    assert "this row was changed after it was written" in done.err
    log.write_bytes(b"a,b\n1,2\n")
    done = influence("relabel", "--undo", cwd=folder, code=2)
    assert "moves.log.csv is not a log of moves" in done.err
    log.unlink()
    done = influence("relabel", "--undo", cwd=folder, code=2)
    assert "there is no log moves.log.csv" in done.err
    # Cut anywhere it is still a log.
    for length in range(0, len(whole), 7):
        log.write_bytes(whole[:length])
        assert len(read_log(log)) <= 1


def test_two_runs_at_once_are_refused(folder: Path, influence: Command) -> None:
    before, log = tree(folder), folder / "moves.log.csv"
    decide(folder, *DECIDED)
    with open_log(log):
        done = influence("relabel", "decisions.csv", "--apply-moves", cwd=folder, code=2)
        assert "error: moves.log.csv is in use by another run" in done.err
    # Nothing was logged, so nothing is left.
    assert not log.exists()
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    with open_log(log):
        done = influence("relabel", "--undo", cwd=folder, code=2)
        assert "error: moves.log.csv is in use by another run" in done.err
    influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == before


def test_where_there_are_no_hard_links_files_are_renamed(
    folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str, **more: bool) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    before = tree(folder)
    decide(folder, *DECIDED)
    influence("relabel", "decisions.csv", "--apply-moves", cwd=folder)
    assert tree(folder) == expected_tree(before)
    influence("relabel", "--undo", cwd=folder)
    assert tree(folder) == before


def test_hints_can_be_typed_from_the_current_folder(
    folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, link = tree(folder), os.link
    (folder / "influence.yaml").rename(folder / "i.yaml")
    decide(folder, *DECIDED)
    words, here = ["-c", f"{folder.name}/i.yaml", "--apply-moves"], folder.parent

    def full(source: str, target: str, **more: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    influence("relabel", f"{folder.name}/decisions.csv", *words, cwd=here, code=2)
    monkeypatch.setattr(os, "link", link)
    (folder / "other.csv").write_text("index,label,decision\n")
    (folder / "below").mkdir()
    done = influence("relabel", "../other.csv", "-c", "../i.yaml", cwd=folder / "below", code=2)
    assert (
        "influence relabel -c ../i.yaml ../decisions.csv --apply-moves; or undo: influence relabel --undo ../m"
        in done.err
    )
    done = influence("relabel", f"{folder.name}/decisions.csv", *words, cwd=here)
    assert f"influence relabel --undo {folder.name}/moves.log.csv moves them back" in done.err
    # No config is needed for it.
    influence("relabel", "--undo", f"{folder.name}/moves.log.csv", cwd=here)
    assert tree(folder) == before


@pytest.mark.parametrize(
    "words",
    [
        ["decisions.csv", "--apply-moves", "-o", "moves.log.csv"],
        ["decisions.csv", "--apply-moves", "-o", "decisions.csv"],
        ["decisions.csv", "--labels", "moves.log.csv", "--force"],
        ["decisions.csv", "--exclude", "moves.log.csv", "--force"],
        ["decisions.csv", "--force", "-o", "decisions.csv"],
        ["decisions.csv", "--force", "-o", "moves.log.csv"],
        ["--undo", "-o", "moves.log.csv"],
        ["--undo", "moves.log.csv", "-o", "./moves.log.csv"],
        ["--undo", "-o", "first.csv"],
    ],
)
def test_neither_log_nor_decisions_are_ever_replaced(folder: Path, influence: Command, words: list[str]) -> None:
    decide(folder, (0, "relabel", "plain"), name="first.csv")
    influence("relabel", "first.csv", "--apply-moves", cwd=folder)
    decide(folder, (3, "drop"))
    before = tree(folder), {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = influence("relabel", *words, cwd=folder, code=2)
    assert " would be both the " in done.err
    assert (tree(folder), {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}) == before


def test_the_run_file_replaces_no_decisions_either(folder: Path, influence: Command) -> None:
    decided = decide(folder, (0, "relabel", "plain"))
    (folder / "rows.csv.run.json").symlink_to(decided.name)
    done = influence("relabel", "decisions.csv", "-o", "rows.csv", cwd=folder, code=2)
    assert "rows.csv.run.json would be both the decisions and the run file of -o" in done.err


def test_an_undo_tells_of_each_move(folder: Path) -> None:
    planned(folder)()
    told: list[int] = []
    undo_moves(folder / "moves.log.csv", told.append)
    assert sum(told) == 6
