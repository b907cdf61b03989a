"""Points far from every class, among classes."""

from __future__ import annotations

import numpy as np
import torch

from influence_cli.inspection.off_topic import find_off_topic


def test_points_of_no_class_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(4), 60)
    centres = 4 * torch.randn(4, 12, generator=generator)
    x = centres[torch.from_numpy(labels)] + torch.randn(240, 12, generator=generator)
    strange = 8 * torch.randn(3, 12, generator=generator)
    result = find_off_topic(torch.cat([x, strange]), np.concatenate([labels, [0, 1, 2]]))
    assert set(np.argsort(-result.distance)[:3].tolist()) == {240, 241, 242}
    assert set(result.rows.tolist()) >= {240, 241, 242}
    assert len(result.rows) <= 6


def test_without_labels_all_is_one_class() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(find_off_topic(x, np.full(50, -1)).distance).all()


def test_too_few_images_are_not_judged() -> None:
    assert len(find_off_topic(torch.eye(4), np.arange(4)).rows) == 0
