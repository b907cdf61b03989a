"""Where the public data sets are looked for, and what is said of one that is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bench import public_data
from tests.support.public_data import shared

sys.path.append(str(Path(public_data.__file__).parent / "peers"))
from common import read_mosaic


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without any data set; INFLUENCE_DATA is not set."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setattr(public_data, "CHECKOUT", folder)
    monkeypatch.setattr(public_data, "DOWNLOADED", folder / "build" / "data")
    monkeypatch.delenv("INFLUENCE_DATA", raising=False)
    return folder


def test_the_first_folder_that_has_a_set_counts(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = checkout / "elsewhere"
    monkeypatch.setenv("INFLUENCE_DATA", str(named))
    assert public_data.find("usps") is None
    for place in (checkout / "build" / "data", named, checkout.parent / "shared" / "data"):
        (place / "usps").mkdir(parents=True)
        assert public_data.find("usps") == place / "usps"
        assert shared("usps") == place / "usps"
    (named / "pacs").mkdir()
    assert public_data.find("pacs") == named / "pacs"


@pytest.mark.parametrize("name", [*public_data.FROM_TORCHVISION, *public_data.ELSEWHERE])
def test_a_set_that_is_not_there_is_named_and_how_to_get_it(checkout: Path, name: str) -> None:
    with pytest.raises(pytest.skip.Exception) as skipped:
        shared(name)
    assert f"the data set {name} is not here" in str(skipped.value)
    assert ("make data" in str(skipped.value)) == (name in public_data.FROM_TORCHVISION)
    assert "INFLUENCE_DATA" in str(skipped.value)
    with pytest.raises(SystemExit) as ended:
        public_data.need(name)
    assert name in str(ended.value.code)
    assert public_data.need(name, checkout) == checkout / name


def test_mosaics_are_read_as_they_were(tmp_path: Path) -> None:
    images = np.zeros((100**2, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(100**2) % 251
    images[:, 31, 1, 2] = np.arange(100**2) // 251
    labels = (np.arange(100**2) % 10).astype(np.uint8)
    public_data.write_mosaics(tmp_path / "cifar10", images, labels, "test")
    assert np.array_equal(read_mosaic(tmp_path / "cifar10" / "test_batch.webp"), images)
    assert np.array_equal(np.load(tmp_path / "cifar10" / "test_labels.npy"), labels)


def test_mnist_is_unpacked_from_the_files_that_are_here(tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    shared("mnist")
    public_data.unpack("mnist", tmp_path / "mnist")
    assert len(MNIST(tmp_path / "mnist", train=False)) == 10_000
