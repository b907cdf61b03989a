"""Where the logits are in what a model returns."""

from __future__ import annotations

import pytest
import torch

from influence_cli.errors import InfluenceError
from influence_cli.setup.fitting import logits_beside

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
ONE = torch.tensor([[2.0], [-1.0]])
SOFTMAX = LOGITS.softmax(dim=1)


@pytest.mark.parametrize(
    ("returned", "key"),
    [
        ((SOFTMAX, LOGITS), 1),
        ([SOFTMAX, torch.ones(2), LOGITS], 2),
        ((ONE.sigmoid(), ONE), 1),
        ((ONE.sigmoid()[:, 0], ONE[:, 0]), 1),
        ({"out": SOFTMAX, "raw": LOGITS}, "raw"),
        ((SOFTMAX, SOFTMAX), None),
        ((SOFTMAX, LOGITS + torch.eye(2, 3)), None),
        ((SOFTMAX, LOGITS[:1]), None),
        ({"out": SOFTMAX, "a.b": LOGITS}, None),
        (SOFTMAX, None),
    ],
)
def test_the_logits_are_what_the_probabilities_are_made_of(returned: object, key: object) -> None:
    assert logits_beside(returned) == key


def test_what_has_no_first_output_is_an_error() -> None:
    with pytest.raises(InfluenceError, match="has no logits"):
        logits_beside({"a": SOFTMAX})
