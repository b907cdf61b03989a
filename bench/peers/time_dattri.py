"""Time dattri: EK-FAC over the Linear layers, TracIn and TRAK over all parameters, Arnoldi influence functions.

ENV/bin/python bench/peers/time_dattri.py CASE_FOLDER OUT.json [--scores OUT.npz]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Case, Counted, Log, run_tests, start
from dattri.algorithm.influence_function import IFAttributorArnoldi, IFAttributorEKFAC
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

CONVENTIONS = """ekfac: Linear layers only, empirical Fisher (true labels). tracin: gradient dot products without
    projection (its constructor always projects, to 512 numbers; the attribute is set to None afterwards). trak: 4,096
    projections of the gradient of the margin. arnoldi: the Hessian of the mean loss, 100 directions (defaults). Scores
    are + g_test' C g_train, [n, tests], not divided by n. Test gradients are computed anew for every batch of training
    images, so that batch is large. Damping null is read as 1e-3: dattri has no rule of its own."""
# Of training images and their gradients, held at once.
BATCH = {"cnn": {"ekfac": 1000, "full": 1000}, "resnet18": {"ekfac": 1000, "full": 20}}
DIMENSION = 4096
DAMPING = 1e-3


def loss(model: nn.Module, params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Give the mean cross-entropy of a batch."""
    x, y = data
    return nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y)


def loss_of_one(model: nn.Module, params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Give the cross-entropy of an example that comes without a batch dimension."""
    x, y = data
    return loss(model, params, (x.unsqueeze(0), y.unsqueeze(0)))


def margin_of_one(model: nn.Module, params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Give log p - log(1 - p) of an example's label, TRAK's output function."""
    value = loss_of_one(model, params, data)
    return -value - torch.log1p(-torch.exp(-value) + 1e-7)


def probability_of_one(model: nn.Module, params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Give the probability of an example's label."""
    return torch.exp(-loss_of_one(model, params, data))


def time_method(log: Log, case: Case, method: str, make: Callable[[], Any], *, batch: int, cached: bool) -> None:
    """Time the fit, the self-influence and the test steps of one attributor.

    Args:
        cached: Whether the attributor takes its training images from the cache, not from every call.
    """
    data = DataLoader(Counted(case.x, case.y, log), batch_size=batch)
    train = () if cached else (data,)

    def fit() -> Any:
        attributor = make()
        if isinstance(attributor, TracInAttributor):
            attributor.projector_kwargs = None
        else:
            attributor.cache(data)
        return attributor

    # Gradients come from torch.func; without no_grad every score keeps its graph, and Arnoldi all of its 100 passes.
    @torch.no_grad()
    def score(x: Tensor, y: Tensor, _: str) -> Tensor:
        tests = DataLoader(TensorDataset(x, y), batch_size=len(x))
        return attributor.attribute(*train, test_dataloader=tests).T

    @torch.no_grad()
    def self_influence() -> Tensor:
        if cached:
            # After cache() TRAK's asks the images that it was not given for their sampler; so with a fit of its own.
            return make().self_attribute(data).flatten()
        # Given many batches the others go over all of them for each, and add the batches' scores up: so one by one.
        parts = [range(start, min(start + batch, len(case.x))) for start in range(0, len(case.x), batch)]
        return torch.cat(
            [attributor.self_attribute(DataLoader(Subset(data.dataset, part), batch_size=batch)) for part in parts]
        )

    attributor = log.run(method, "fit", fit, total=len(case.x) * {"ekfac": 2, "trak": 1}.get(method, 0))
    if attributor is None:
        return
    scores = log.run(method, "self", self_influence, total=0 if cached else 2 * len(case.x))
    if scores is not None and len(scores) == len(case.x):
        log.keep(**{f"{method}_self": scores})
    run_tests(log, case, method, score, passes=0 if cached else 1)


def main() -> None:
    """Run every method on one case."""
    case, log = start("dattri", "dattri", CONVENTIONS)
    damping = DAMPING if case.settings.damping is None else case.settings.damping
    batch = BATCH[case.settings.model]

    def task(function: Callable[..., Tensor]) -> AttributionTask:
        model = case.model()
        return AttributionTask(partial(function, model), model, case.state)

    def trak() -> TRAKAttributor:
        of_margin = task(margin_of_one)
        probability = partial(probability_of_one, of_margin.model)
        return TRAKAttributor(of_margin, probability, projector_kwargs={"proj_dim": DIMENSION})

    methods: list[tuple[str, Callable[[], Any], int, bool]] = [
        ("ekfac", lambda: IFAttributorEKFAC(task(loss), damping=damping), batch["ekfac"], False),
        (
            "tracin",
            lambda: TracInAttributor(task(loss_of_one), torch.ones(1), normalized_grad=False),
            batch["full"],
            False,
        ),
        ("trak", trak, batch["full"], True),
        ("arnoldi", lambda: IFAttributorArnoldi(task(loss), regularization=damping), batch["full"], False),
    ]
    for method, make, size, cached in methods:
        time_method(log, case, method, make, batch=size, cached=cached)


if __name__ == "__main__":
    main()
