"""What a store is known by: any other number in the model is another model."""

from __future__ import annotations

import torch
from torch import nn

from influence_cli.model.fingerprint import weights_hash


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2, bias=False))


def test_the_hash_of_weights_is_of_every_name_number_and_buffer() -> None:
    before = weights_hash(model())
    assert weights_hash(model()) == before
    hashes = {before}
    for name in model().state_dict():
        other = model()
        value = other.state_dict()[name]
        value.view(-1)[-1:].add_(1)
        hashes.add(weights_hash(other))
    assert len(hashes) == 1 + len(model().state_dict()) == 9
    renamed = nn.Sequential(*model().children())
    renamed.add_module("last", renamed.pop(2))
    assert weights_hash(renamed) not in hashes
