"""pictures: any numbers become 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from influence_cli.data.images import as_picture
from influence_cli.pictures import eight_bit, stretched, view


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([-1.0, 0.0, 1.0], [0.0, 127.5, 255.0]),
        ([3.0, 3.0], [0.0, 0.0]),
        ([np.nan, 2.0, np.inf, 4.0, -np.inf], [0.0, 0.0, 255.0, 255.0, 0.0]),
        ([np.nan], [0.0]),
        ([], []),
    ],
)
def test_numbers_are_stretched_between_their_finite_ends(values: list[float], wanted: list[float]) -> None:
    np.testing.assert_array_equal(stretched(np.array(values)), wanted)


def test_pictures_are_rounded_and_arrays_of_a_page_are_cut() -> None:
    """As they always were: no picture of a report changes."""
    values = np.array([[0.0, 0.5, 1.0]])
    assert np.asarray(eight_bit(Image.fromarray(values.astype(np.float32)))).tolist() == [[0, 128, 255]]
    assert np.asarray(view(values[None])).tolist() == [[0, 128, 255]]
    picture = as_picture(values)
    assert picture is not None
    assert np.asarray(picture).tolist() == [[0, 127, 255]]
