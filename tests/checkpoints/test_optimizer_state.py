"""The rate of each layer under Adam, from what torch.save keeps of the optimiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from influence_cli.checkpoints.optimizer_state import adam_slowness
from influence_cli.errors import InfluenceError


def trained(optimizer: type[torch.optim.Optimizer], **options: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    steps = optimizer(model.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]
    for _ in range(5):
        steps.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        steps.step()
    return model, steps


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("key", ["optimizer", "optimizer_states"])
def test_it_is_the_mean_root_of_the_corrected_second_moments(
    optimizer: type[torch.optim.Optimizer], key: str, tmp_path: Path
) -> None:
    model, steps = trained(optimizer)
    state = steps.state_dict()
    content = {"model": model.state_dict(), key: [state] if key.endswith("s") else state}
    torch.save(content, tmp_path / "last.pt")
    slowness = adam_slowness(tmp_path / "last.pt", model, "influence.yaml:3")
    assert slowness is not None
    moments = [value["exp_avg_sq"] / (1 - 0.999**5) for value in state["state"].values()]
    parts = [torch.cat([pair[0].flatten(), pair[1].flatten()]).sqrt() + 1e-8 for pair in (moments[:2], moments[2:])]
    assert slowness[0] == pytest.approx({"0": float(parts[0].mean()), "2": float(parts[1].mean())})
    assert slowness[1] == pytest.approx(float(torch.cat(parts).mean()))


def test_there_is_none_without_adam(tmp_path: Path) -> None:
    model, steps = trained(torch.optim.SGD, momentum=0.9)
    for content in (model.state_dict(), {"model": model.state_dict(), "optimizer": steps.state_dict()}):
        torch.save(content, tmp_path / "last.pt")
        assert adam_slowness(tmp_path / "last.pt", model, "influence.yaml:3") is None


def test_a_state_of_other_parameters_is_refused_in_one_line(tmp_path: Path) -> None:
    model, steps = trained(torch.optim.Adam)
    torch.save({"model": model.state_dict(), "optimizer": steps.state_dict()}, tmp_path / "last.pt")
    for other in (nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Linear(2, 3))):
        with pytest.raises(InfluenceError, match="4 parameters\\) is not that of the model's parameters") as refused:
            adam_slowness(tmp_path / "last.pt", other, "influence.yaml:3")
        assert "curvature.damping to auto" in str(refused.value.hint)
