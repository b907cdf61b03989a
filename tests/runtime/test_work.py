"""What a command was doing when an error came that nobody expected."""

from __future__ import annotations

import pytest

from influence_cli.errors import InfluenceError
from influence_cli.runtime.terminal import Terminal
from influence_cli.runtime.work import during, examples, where_it_stopped


def test_the_innermost_part_and_the_examples_in_work_are_told() -> None:
    with examples(lambda: "training example 3"):
        with pytest.raises(ValueError, match="x") as caught, Terminal(silent=True).status("outer"), during("inner"):
            raise ValueError("x")
        assert where_it_stopped(caught.value) == ("training example 3", "inner")
    assert where_it_stopped(caught.value) == ("", "inner")


def test_an_expected_error_stays_as_it_is() -> None:
    with pytest.raises(InfluenceError) as caught, during("work"):
        raise InfluenceError("known")
    assert not hasattr(caught.value, "__notes__")
