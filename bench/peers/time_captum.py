"""Time captum: TracInCP with one checkpoint over all Linear and Conv2d layers, and its Arnoldi influence functions.

ENV/bin/python bench/peers/time_captum.py CASE_FOLDER OUT.json [--scores OUT.npz]
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from captum.influence import TracInCP

# captum has it, documents it, and does not export it.
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from common import Case, Counted, Log, run_tests, start
from torch import nn

CONVENTIONS = """tracin: gradient dot products + g_test' g_train of summed cross-entropy at one checkpoint with learning
    rate 1; no curvature, so no fit. arnoldi: the Hessian of the summed loss of all training images, the 50 largest of
    200 Arnoldi directions, captum's defaults. Both on all Linear and Conv2d layers (sample-wise gradients are offered
    for no others), not divided by n. TracInCPFast is not timed: it sees the last layer only."""
BATCHES = {"cnn": 256, "resnet18": 64}
ARNOLDI_DIMENSION = 200  # captum's default: so many passes of Hessian-vector products


def layers_of(model: nn.Module) -> list[str]:
    """Name the layers whose sample-wise gradients captum offers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def time_method(log: Log, case: Case, method: str, influence: Any) -> None:
    """Time self-influence and the test steps; TracIn and Arnoldi are called alike."""
    scores = log.run(method, "self", influence.self_influence, total=len(case.x))
    if scores is not None:
        log.keep(**{f"{method}_self": scores})
    run_tests(log, case, method, lambda x, y, _: influence.influence((x, y)), passes=1)


def main() -> None:
    """Run both methods on one case."""
    case, log = start("captum", "captum", CONVENTIONS)
    warnings.simplefilter("ignore")  # captum warns at every call that it cannot show its progress
    model, data = case.model(), Counted(case.x, case.y, log)
    layers = layers_of(model)
    log.record["tracked_parameters"] = sum(p.numel() for name in layers for p in model.get_submodule(name).parameters())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.pt"
        torch.save(case.state, checkpoint)

        def load(model: nn.Module, path: str) -> float:
            model.load_state_dict(torch.load(path, weights_only=True))
            return 1.0  # the learning rate that TracIn multiplies by

        settings = {
            "checkpoints_load_func": load,
            "layers": layers,
            "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
            "batch_size": BATCHES[case.settings.model],
            "sample_wise_grads_per_batch": True,
        }
        tracin = TracInCP(model, data, [str(checkpoint)], **settings)
        log.add("tracin", "fit", unsupported="TracIn has no curvature to fit")
        time_method(log, case, "tracin", tracin)
        arnoldi = log.run(
            "arnoldi",
            "fit",
            lambda: ArnoldiInfluenceFunction(model, data, str(checkpoint), **settings),
            total=ARNOLDI_DIMENSION * len(case.x),
        )
        if arnoldi is not None:
            time_method(log, case, "arnoldi", arnoldi)


if __name__ == "__main__":
    main()
