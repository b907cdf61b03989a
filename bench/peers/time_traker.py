"""Time TRAK: one checkpoint, 4,096 random projections on the CPU.

ENV/bin/python bench/peers/time_traker.py CASE_FOLDER OUT.json [--scores OUT.npz]
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from common import Case, run_tests, start
from torch import Tensor
from trak import TRAKer

CONVENTIONS = """TRAK with one checkpoint, all parameters, 4,096 normal projections (BasicProjector, its choice on a
    CPU), float32, lambda 0: score = phi_test' (X'X)^-1 phi_train (1 - p_train), phi the projected gradient of the
    margin; + is helpful; not an estimate of a change of the loss. It keeps phi and the scores in memory maps."""
METHOD = "trak"
DIMENSION = 4096
# Large, as the projection matrix is drawn anew for every batch; of resnet18 an image's gradient alone is 45 MB.
BATCH = {"cnn": 1000, "resnet18": 100}


def main() -> None:
    """Featurise the training images, then score."""
    case, log = start("traker", "traker", CONVENTIONS)
    log.record["tracked_parameters"] = log.record["parameters"]
    batch, n = BATCH[case.settings.model], len(case.x)
    with tempfile.TemporaryDirectory() as folder:
        log.folder = Path(folder)
        traker = log.run(METHOD, "fit/projector", lambda: make(case, folder))
        if traker is None:
            return

        def featurize() -> bool:
            traker.load_checkpoint(case.state, model_id=0)
            for inputs, targets in zip(case.x.split(batch), case.y.split(batch), strict=True):
                traker.featurize((inputs, targets), num_samples=len(inputs))
                log.done += len(inputs)
            return True

        def finalize() -> bool:
            traker.finalize_features()
            return True

        def score(x: Tensor, y: Tensor, name: str) -> Tensor:
            traker.start_scoring_checkpoint(name, case.state, model_id=0, num_targets=len(x))
            for inputs, targets in zip(x.split(batch), y.split(batch), strict=True):
                traker.score((inputs, targets), num_samples=len(inputs))
            return torch.tensor(traker.finalize_scores(name).T)

        if log.run(METHOD, "fit/featurize", featurize, total=n) and log.run(METHOD, "fit/finalize", finalize):
            log.sum_fit(METHOD)
            log.add(METHOD, "self", unsupported="TRAKer has no self-influence; the training images as targets: n x n")
            run_tests(log, case, METHOD, score)


def make(case: Case, folder: str) -> TRAKer:
    """Set up TRAK for the CPU."""
    return TRAKer(
        model=case.model(),
        task="image_classification",
        train_set_size=len(case.x),
        save_dir=folder,
        device="cpu",
        proj_dim=DIMENSION,
        use_half_precision=False,
        logging_level=logging.ERROR,
    )


if __name__ == "__main__":
    main()
