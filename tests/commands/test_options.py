"""options: which of them were given, and which exclude each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_cli.commands.options import given, refuse_together
from influence_cli.errors import InfluenceError


@pytest.mark.parametrize(
    ("value", "was"), [(None, False), (False, False), ([], False), (True, True), (0, True), (Path("a"), True)]
)
def test_zero_is_given_and_a_flag_that_is_not_set_is_not(value: object, was: bool) -> None:
    assert given(value) == given(None, value) == was


def test_only_all_of_them_together_are_refused() -> None:
    refuse_together(0, False, message="m", hint="h")
    refuse_together(None, "x", message="m", hint="h")
    with pytest.raises(InfluenceError, match="m") as caught:
        refuse_together(0, "x", message="m", hint="h")
    assert caught.value.hint == "h"
