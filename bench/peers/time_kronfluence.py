"""Time kronfluence: EK-FAC over all Linear and Conv2d modules, self-influence and test scores.

ENV/bin/python bench/peers/time_kronfluence.py CASE_FOLDER OUT.json [--scores OUT.npz]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import Case, Log, run_tests, start
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

CONVENTIONS = """EK-FAC on all Linear and Conv2d modules (weight and bias as one matrix, bias as the last column of the
    layer's inputs; batch normalisation left out), float32, eigendecompositions in float64. Lambda is the mean over
    training examples of the squared example gradients in the eigenbasis. Losses are summed over the batch. A score is
    + g_test' (F + damping)^-1 g_train, not divided by n; damping null is 0.1 * mean(Lambda), layer by layer. Labels
    for the Fisher are sampled unless the case says empirical."""
METHOD = "ekfac"
# Where a layer's gradients of 256 images no longer fit (resnet18: 9 MB an image and layer), smaller batches.
BATCHES = {"cnn": {"train": 256, "query": 100}, "resnet18": {"train": 64, "query": 20}}


class Classification(Task):
    """Tell kronfluence the loss and the measurement: cross-entropy, summed as its covariances and scores expect."""

    def __init__(self, log: Log | None = None) -> None:
        self.log = log

    def compute_train_loss(self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        """Sum the losses of the batch, at the true labels or at labels drawn from the model."""
        inputs, targets = batch
        if self.log is not None:
            self.log.done += len(inputs)
        outputs = model(inputs)
        if sample:
            with torch.no_grad():
                targets = torch.multinomial(outputs.softmax(dim=-1), num_samples=1).flatten()
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        """Sum the losses of the test examples of the batch."""
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets, reduction="sum")


def fit(log: Log, case: Case, make: Callable[[], Analyzer]) -> bool:
    """Fit covariances, eigendecompositions and Lambda, and tell whether scores can be computed.

    Where Lambda is stopped at the limit, it is fitted again with one batch: the scores are then worthless and are not
    kept, but what they cost does not depend on it.
    """
    train, batch = TensorDataset(case.x, case.y), BATCHES[case.settings.model]["train"]
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=case.settings.empirical)
    data = {"per_device_batch_size": batch, "factor_args": arguments, "overwrite_output_dir": True}

    def covariances() -> bool:
        make().fit_covariance_matrices("factors", train, **data)
        return True

    def eigendecompositions() -> bool:
        make().perform_eigendecomposition("factors", factor_args=arguments, overwrite_output_dir=True)
        return True

    def lambdas() -> bool:
        make().fit_lambda_matrices("factors", train, **data)
        return True

    if not log.run(METHOD, "fit/covariances", covariances, total=len(case.x)):
        return False
    if not log.run(METHOD, "fit/eigendecompositions", eigendecompositions):
        return False
    if not log.run(METHOD, "fit/lambda", lambdas, total=len(case.x)):
        if log.trouble(METHOD, "fit/lambda") != "stopped":
            return False
        log.options = replace(log.options, scores=None)
        train = Subset(train, range(min(batch, len(case.x))))
        return bool(log.run(METHOD, "fit/lambda of one batch", lambdas, note="only to time what follows"))
    log.sum_fit(METHOD)
    return True


def main() -> None:
    """Run every step on one case."""
    case, log = start("kronfluence", "kronfluence", CONVENTIONS)
    train, batches = TensorDataset(case.x, case.y), BATCHES[case.settings.model]
    with tempfile.TemporaryDirectory() as folder:
        log.folder = Path(folder)

        def make() -> Analyzer:
            # Anew for every step: one that was stopped half-way leaves its hooks behind.
            task = Classification(log)
            model = prepare_model(case.model(), task)
            return Analyzer("case", model, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=30)

        layers = [module for module in case.model().modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        log.record["tracked_parameters"] = sum(p.numel() for layer in layers for p in layer.parameters())
        if not fit(log, case, make):
            return
        # All queries of a step against one pass over the training images.
        scoring = ScoreArguments(
            damping_factor=case.settings.damping, query_gradient_accumulation_steps=-(-100 // batches["query"])
        )

        def self_influence() -> Tensor:
            analyzer = make()
            analyzer.compute_self_scores(
                "self", "factors", train, per_device_train_batch_size=batches["train"], score_args=scoring
            )
            return analyzer.load_self_scores("self")["all_modules"]

        def score(x: Tensor, y: Tensor, name: str) -> Tensor:
            analyzer = make()
            analyzer.compute_pairwise_scores(
                name,
                "factors",
                TensorDataset(x, y),
                train,
                per_device_query_batch_size=min(batches["query"], len(x)),
                per_device_train_batch_size=batches["train"],
                score_args=scoring,
            )
            return analyzer.load_pairwise_scores(name)["all_modules"]

        scores = log.run(METHOD, "self", self_influence, total=len(case.x))
        if scores is not None:
            log.keep(ekfac_self=scores)
        run_tests(log, case, METHOD, score, passes=1)


if __name__ == "__main__":
    main()
