"""What a config names is found, checked against its signature, called; whatever fails there is one line of error."""

from __future__ import annotations

import colorsys
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from influence_cli.config import moved
from influence_cli.config.moved import MOVED, new_name
from influence_cli.config.user_code import accepts, call, import_object
from influence_cli.data.parquet_images import ParquetImages
from influence_cli.errors import InfluenceError, describe

_COUNTER = itertools.count()


@pytest.fixture(autouse=True)
def clean_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the modules and import paths of a test when it ends."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def name() -> str:
    """Give a module name that no other test has used."""
    return f"user_module_{next(_COUNTER)}"


def refused(action: Callable[[], object]) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        action()
    assert "\n" not in caught.value.message
    return caught.value


def where(*keys: str) -> str:
    """Number the lines of an imagined config."""
    return {(): "influence.yaml:3", ("args", "a"): "influence.yaml:5"}.get(keys, f"influence.yaml:{'.'.join(keys)}")


# Names


@pytest.mark.parametrize(
    ("dotted", "expected"),
    [
        ("json.dumps", json.dumps),
        ("os.path.join", os.path.join),
        ("pathlib.Path", Path),
        ("pathlib.Path.exists", Path.exists),
        ("colorsys.ONE_THIRD", colorsys.ONE_THIRD),
    ],
)
def test_a_dotted_name_is_the_object_of_an_importable_module(tmp_path: Path, dotted: str, expected: object) -> None:
    assert import_object(dotted, tmp_path, "c:1") is expected


def test_a_dotted_name_may_be_a_module_or_a_package_beside_the_config(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("class Net:\n    class Inner:\n        value = 7\n")
    (tmp_path / f"{name}_package" / "sub").mkdir(parents=True)
    (tmp_path / f"{name}_package" / "__init__.py").write_text("")
    (tmp_path / f"{name}_package" / "sub" / "__init__.py").write_text("")
    (tmp_path / f"{name}_package" / "sub" / "models.py").write_text("def build():\n    return 'built'\n")
    assert import_object(f"{name}.Net.Inner.value", tmp_path, "c:1") == 7
    assert import_object(f"{name}_package.sub.models.build", tmp_path, "c:1")() == "built"


def test_a_file_beside_the_config_does_not_hide_an_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("def rgb_to_hsv():\n    return 'mine'\n")
    monkeypatch.delitem(sys.modules, "colorsys")
    found = import_object("colorsys.rgb_to_hsv", tmp_path, "c:1")
    assert found(1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("dotted", ["resnet18", "", ".", "a..b", "a.b-c", "a.1b", "my model.build", "a."])
def test_what_is_no_dotted_name_is_refused(tmp_path: Path, dotted: str) -> None:
    error = refused(lambda: import_object(dotted, tmp_path, "influence.yaml:2"))
    assert error.message == f"influence.yaml:2: {dotted!r} is not a dotted name"
    assert "./model.py:build" in error.hint


def test_a_module_that_does_not_exist_names_the_ways_to_one(tmp_path: Path) -> None:
    error = refused(lambda: import_object("no_such_module_here.sub.build", tmp_path, "influence.yaml:2"))
    assert error.message == "influence.yaml:2: no module named 'no_such_module_here'"
    assert "./no_such_module_here.py:build" in error.hint


@pytest.mark.parametrize(
    ("dotted", "message", "hint"),
    [
        ("json.dmps", "json has no 'dmps'", "did you mean 'dumps'?"),
        ("pathlib.Path.exist", "pathlib.Path has no 'exist'", "did you mean 'exists'?"),
        ("os.pth.join", "os has no 'pth'", "did you mean 'path'?"),
        ("json.decoder.JSONDecodr", "json.decoder has no 'JSONDecodr'", "did you mean 'JSONDecoder'?"),
    ],
)
def test_an_object_that_does_not_exist_gets_the_nearest_one(
    tmp_path: Path, dotted: str, message: str, hint: str
) -> None:
    error = refused(lambda: import_object(dotted, tmp_path, "influence.yaml:2"))
    assert error.message == f"influence.yaml:2: {message}"
    assert hint in error.hint


# Files


def test_an_object_of_a_file_is_found_from_the_configs_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, other = tmp_path / "project", tmp_path / "other"
    (project / "sub").mkdir(parents=True)
    other.mkdir()
    monkeypatch.chdir(other)
    (project / f"{name}.py").write_text("value = 'beside'\n")
    (project / "sub" / f"{name}.py").write_text("value = 'below'\n")
    (tmp_path / f"{name}.py").write_text("value = 'above'\n")
    assert import_object(f"./{name}.py:value", project, "c:1") == "beside"
    assert import_object(f"{name}.py:value", project, "c:1") == "beside"
    assert import_object(f"sub/{name}.py:value", project, "c:1") == "below"
    assert import_object(f"../{name}.py:value", project, "c:1") == "above"
    assert import_object(f"{tmp_path / name}.py:value", project, "c:1") == "above"


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path, name: str) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(f"class Net:\n    folder = {folder!r}\n")
    first = import_object(f"./a/{name}.py:Net", tmp_path, "c:1")
    second = import_object(f"./b/{name}.py:Net", tmp_path, "c:1")
    assert (first.folder, second.folder) == ("a", "b")
    assert import_object(f"./{name}.py:Net", tmp_path / "a", "c:1") is first


def test_a_file_runs_once_however_often_it_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(
        "from pathlib import Path\n"
        "with (Path(__file__).parent / 'runs').open('a') as file:\n    file.write('x')\n"
        "class Net:\n    pass\n\ndef build():\n    return Net()\n"
    )
    net = import_object(f"./{name}.py:Net", tmp_path, "c:1")
    assert type(import_object(f"{name}.py:build", tmp_path, "c:1")()) is net
    assert (tmp_path / "runs").read_text() == "x"


def test_a_file_imports_the_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{name}.py").write_text(f"from {name}_layers import VALUE\n")
    (tmp_path / "sub" / f"{name}_layers.py").write_text("VALUE = 5\n")
    assert import_object(f"./sub/{name}.py:VALUE", tmp_path, "c:1") == 5
    assert str(tmp_path / "sub") != sys.path[0]


@pytest.mark.parametrize("spelled", ["{0}.net.VALUE", "../{0}/net.py:VALUE"])
@pytest.mark.parametrize("current", ["", "elsewhere"])
def test_a_package_beside_the_folder_of_the_config_is_imported(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, spelled: str, current: str
) -> None:
    """The usual layout: configs/influence.yaml, and src/net.py that imports from src."""
    for folder in (name, "configs", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / name / "net.py").write_text(f"from {name}.parts import VALUE\n")
    (tmp_path / name / "parts.py").write_text("VALUE = 5\n")
    monkeypatch.chdir(tmp_path / current)
    assert import_object(spelled.format(name), tmp_path / "configs", "c:1") == 5


def test_a_factory_imports_the_files_beside_it_when_it_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{name}.py").write_text(
        f"def build():\n    from {name}_layers import VALUE\n    return VALUE\n"
    )
    (tmp_path / "sub" / f"{name}_layers.py").write_text("VALUE = 5\n")
    build = import_object(f"./sub/{name}.py:build", tmp_path, "c:1")
    assert call(build, {}, tmp_path, "build", where) == 5


def test_what_a_file_defines_is_found_again_by_its_module_name(tmp_path: Path, name: str) -> None:
    import pickle

    (tmp_path / f"{name}.py").write_text("class Net:\n    def __init__(self):\n        self.size = 3\n")
    made = import_object(f"./{name}.py:Net", tmp_path, "c:1")()
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made)
    assert again.size == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("./{name}.py", "'./{name}.py' names a file but nothing in it"),
        ("./{name}.py:", "'./{name}.py:' names a file but nothing in it"),
        ("./{name}_missing.py:build", "there is no file {folder}/{name}_missing.py"),
        ("./folder:build", "there is no file {folder}/folder"),
        ("./{name}.txt:build", "{folder}/{name}.txt is not a Python file"),
        ("./{name}.py:biuld", "./{name}.py has no 'biuld'"),
        ("./{name}.py:build.inner", "./{name}.py has no 'build.inner'"),
    ],
)
def test_a_file_or_an_object_in_it_that_does_not_exist_is_refused(
    tmp_path: Path, name: str, given: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / f"{name}.py").write_text("def build():\n    pass\n")
    (tmp_path / f"{name}.txt").write_text("def build():\n    pass\n")
    error = refused(lambda: import_object(given.format(name=name), tmp_path, "influence.yaml:2"))
    assert error.message == f"influence.yaml:2: {message.format(name=name, folder=tmp_path)}"
    if "biuld" in given:
        assert "did you mean 'build'?" in error.hint


def test_the_home_of_somebody_who_does_not_exist_is_a_missing_file(tmp_path: Path) -> None:
    assert "there is no file" in refused(lambda: import_object("~no-such-user/m.py:f", tmp_path, "c:1")).message


# User modules that raise


RAISES = [
    ("raise ValueError('too\\n  bad')", "ValueError: too bad"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import no_such_module_here", "No module named 'no_such_module_here'"),
    ("from json import no_such_name", "ImportError: cannot import name 'no_such_name' from 'json'"),
    ("def f(:\n    pass", "SyntaxError: "),
    ("x = '", "SyntaxError: "),
    ("    x = 1", "IndentationError: "),
    ("raise Exception", "failed: Exception"),
    ("assert 1 == 2, 'no'", "AssertionError: no"),
    ("import sys\nsys.exit()", "SystemExit"),
    ("import sys\nsys.exit(0)", "SystemExit: 0"),
    ("raise SystemExit('usage: train.py')", "SystemExit: usage: train.py"),
]


@pytest.mark.parametrize(("code", "message"), RAISES)
@pytest.mark.parametrize("kind", ["./{}.py:build", "{}.build"])
def test_a_user_module_that_raises_is_one_line_with_its_reason(
    tmp_path: Path, name: str, code: str, message: str, kind: str
) -> None:
    (tmp_path / f"{name}.py").write_text(f"{code}\n")
    error = refused(lambda: import_object(kind.format(name), tmp_path, "influence.yaml:2"))
    assert error.message.startswith("influence.yaml:2: ")
    assert name in error.message
    assert message in error.message


def test_a_file_that_was_mended_runs_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text("raise ValueError\n")
    refused(lambda: import_object(f"./{name}.py:value", tmp_path, "c:1"))
    path.write_text("value = 3\n")
    assert import_object(f"./{name}.py:value", tmp_path, "c:1") == 3


def test_ctrl_c_in_a_user_module_is_not_swallowed(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        import_object(f"./{name}.py:value", tmp_path, "c:1")


def test_a_package_whose_own_import_is_missing_names_that_import(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "inner.py").write_text(f"from {name}.missing import x\n")
    error = refused(lambda: import_object(f"{name}.inner.build", tmp_path, "influence.yaml:2"))
    assert error.message == f"influence.yaml:2: importing {name}.inner failed: No module named '{name}.missing'"


@pytest.mark.parametrize("kind", ["./{}.py:Net", "{}.Net"])
def test_an_attribute_that_raises_when_it_is_asked_for_is_one_line(tmp_path: Path, name: str, kind: str) -> None:
    # As packages do that load their parts when first used.
    (tmp_path / f"{name}.py").write_text("def __getattr__(name):\n    raise ImportError(f'{name} needs an extra')\n")
    error = refused(lambda: import_object(kind.format(name), tmp_path, "influence.yaml:2"))
    assert error.message.startswith("influence.yaml:2: ")
    assert "Net needs an extra" in error.message


# Calls


def test_a_factory_is_called_with_the_arguments_of_the_config(tmp_path: Path) -> None:
    def build(a: int, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
        return a, b, c

    assert call(build, {"a": 1}, tmp_path, "m.build", where) == (1, 2, 3)
    assert call(build, {"a": 1, "c": 5, "b": 4}, tmp_path, "m.build", where) == (1, 4, 5)
    assert call(lambda **rest: rest, {"x": 1, "y": [2]}, tmp_path, "m.build", where) == {"x": 1, "y": [2]}


class Counted:
    """Counts how often it was made."""

    made = 0

    def __init__(self, a: int, depth: int = 3, *, width: int) -> None:
        type(self).made += 1


def counted(a: int, depth: int = 3, *, width: int) -> None:
    Counted.made += 1


def open_ended(a: int, **rest: int) -> None:
    Counted.made += 1


def positional(a: int, /, depth: int = 3) -> None:
    Counted.made += 1


SIGNATURES = [
    (Counted, {"a": 1, "width": 2, "dpeth": 3}, "args.dpeth: m.x takes no argument 'dpeth'", "did you mean 'depth'?"),
    (counted, {"a": 1, "width": 2, "dpeth": 3}, "args.dpeth: m.x takes no argument 'dpeth'", "did you mean 'depth'?"),
    (counted, {"a": 1, "wdth": 2}, "args.wdth: m.x takes no argument 'wdth'", "known: a, depth, width"),
    (Counted, {"width": 2}, "3: m.x needs the argument 'a'", "args: {a: …}"),
    (counted, {"a": 1}, "3: m.x needs the argument 'width'", "args: {width: …}"),
    (open_ended, {"b": 1}, "3: m.x needs the argument 'a'", "args: {a: …}"),
    (positional, {"a": 1}, "5: m.x takes no argument 'a'", "known: depth"),
    (Counted, {"self": 1, "a": 1, "width": 2}, "args.self: m.x takes no argument 'self'", "known: a, depth, width"),
    (lambda: None, {"a": 1}, "5: m.x takes no argument 'a'", "known: "),
]


@pytest.mark.parametrize(("callee", "args", "message", "hint"), SIGNATURES)
def test_arguments_are_checked_against_the_signature_before_the_call(
    tmp_path: Path, callee: Callable[..., Any], args: dict[str, int], message: str, hint: str
) -> None:
    Counted.made = 0
    error = refused(lambda: call(callee, args, tmp_path, "m.x", where))
    assert error.message == f"influence.yaml:{message}"
    assert hint in error.hint
    assert Counted.made == 0


def test_a_callee_without_a_signature_is_called_all_the_same(tmp_path: Path) -> None:
    # A C type such as this has none.
    assert call(dict, {"a": 1}, tmp_path, "builtins.dict", where) == {"a": 1}


@pytest.mark.parametrize("thing", [3, "word", None, json])
def test_what_cannot_be_called_is_refused(tmp_path: Path, thing: Any) -> None:
    error = refused(lambda: call(thing, {}, tmp_path, "m.x", where))
    assert error.message == f"influence.yaml:3: m.x is a {type(thing).__name__}, which cannot be called"


def failing(kind: type[BaseException], text: str) -> None:
    raise kind(text)


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, OSError, KeyError, RecursionError, SystemExit])
def test_a_factory_that_raises_is_one_line_with_its_reason(tmp_path: Path, kind: type[BaseException]) -> None:
    error = refused(lambda: call(failing, {"kind": kind, "text": "no\ndata"}, tmp_path, "m.x", where))
    assert error.message.startswith(f"influence.yaml:3: m.x failed: {kind.__name__}: ")
    assert "data" in error.message
    assert "INFLUENCE_DEBUG=1" in error.hint


def test_an_error_that_is_already_ours_is_told_as_it_is_with_its_line(tmp_path: Path) -> None:
    error = refused(lambda: call(failing, {"kind": InfluenceError, "text": "told well"}, tmp_path, "m.x", where))
    assert error.message == "influence.yaml:3: told well"


def test_a_factory_runs_in_the_folder_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call(Path.cwd, {}, tmp_path / "project", "m.x", where) == (tmp_path / "project").resolve()
    refused(lambda: call(failing, {"kind": ValueError, "text": ""}, tmp_path / "project", "m.x", where))
    assert Path.cwd() == (tmp_path / "here").resolve()


@pytest.mark.parametrize(
    ("callee", "argument", "expected"),
    [(counted, "depth", True), (Counted, "width", True), (counted, "transform", False), (dict, "transform", False)],
)
def test_accepts_says_whether_an_argument_is_taken(callee: Callable[..., Any], argument: str, expected: bool) -> None:
    assert accepts(callee, argument) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("a\n  b\tc"), "ValueError: a b c"),
        (ValueError(), "ValueError"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("y" * 300), "ValueError: " + "y" * 300),
        (ValueError("y" * 301), "ValueError: " + "y" * 297 + "…"),
    ],
)
def test_an_exception_is_described_in_one_line(error: Exception, expected: str) -> None:
    assert describe(error) == expected


def test_a_name_from_before_the_package_had_folders_works_and_says_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(moved, "tell", told.append)
    old = "influence_cli.parquet_images.ParquetImages"
    assert import_object(old, tmp_path, "a.yaml:3") is ParquetImages
    assert import_object(old, tmp_path, "a.yaml:3") is ParquetImages
    assert told == [
        f"a.yaml:3: {old} is now called influence_cli.data.parquet_images.ParquetImages; "
        "the old name works until the next release"
    ]


@pytest.mark.parametrize("old", MOVED)
def test_every_moved_name_leads_somewhere(tmp_path: Path, old: str) -> None:
    found = import_object(f"influence_cli.{old}", tmp_path, "w")
    assert found.__name__ == MOVED[old].rpartition(".")[2]


def test_a_name_that_did_not_move_is_left_alone() -> None:
    assert new_name("influence_cli.load_config") is None
    assert new_name("torchvision.parquet_images.ParquetImages") is None


def test_no_compiled_copy_is_kept_of_code_that_may_be_edited(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / f"{name}_helper.py").write_text("value = 1\n")
    path = tmp_path / f"{name}.py"
    path.write_text(f"from {name}_helper import value\n")
    assert import_object(f"./{name}.py:value", tmp_path, "here") == 1
    assert not list(tmp_path.rglob("*.pyc"))
    assert sys.dont_write_bytecode is False
