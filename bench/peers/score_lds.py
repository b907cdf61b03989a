"""Scores of kronfluence or TRAK for bench/verify_lds.py: every test image with every training image.

ENV/bin/python bench/peers/score_lds.py kronfluence|traker FOLDER

FOLDER/case.npz holds x, y, test_x, test_y; FOLDER/model-0.pt … the checkpoints of the demo's CNN. Written is
FOLDER/PEER.npz: scores [tests, n] by the name of a method, each positive where leaving the image out should raise the
loss. kronfluence: EK-FAC, labels for the Fisher sampled, damping 0.1 × mean Λ of a layer (None) and its default 1e-8;
several checkpoints averaged. TRAK: 4,096 random projections a checkpoint, its own average of several.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import build_model
from torch import Tensor, nn

TRAIN_BATCH, TEST_BATCH, DIMENSION = 256, 100, 4096
DAMPINGS = {"0.1 × mean Λ": None, "1e-8": 1e-8}


def load(path: Path) -> nn.Module:
    """Read a checkpoint."""
    model = build_model("cnn").eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def kronfluence(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Score by EK-FAC with each damping, one checkpoint and the mean of all."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from time_kronfluence import Classification
    from torch.utils.data import TensorDataset

    train, test = TensorDataset(x, y), TensorDataset(test_x, test_y)
    found: dict[str, list[np.ndarray]] = {name: [] for name in DAMPINGS}
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            task = Classification()
            analyzer = Analyzer(
                "case",
                prepare_model(load(path), task),
                task,
                cpu=True,
                disable_tqdm=True,
                output_dir=folder,
                log_level=30,
            )
            arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=False)
            analyzer.fit_all_factors("factors", train, per_device_batch_size=TRAIN_BATCH, factor_args=arguments)
            for number, (name, damping) in enumerate(DAMPINGS.items()):
                analyzer.compute_pairwise_scores(
                    str(number),
                    "factors",
                    test,
                    train,
                    per_device_query_batch_size=TEST_BATCH,
                    per_device_train_batch_size=TRAIN_BATCH,
                    score_args=ScoreArguments(
                        damping_factor=damping, query_gradient_accumulation_steps=-(-len(test_x) // TEST_BATCH)
                    ),
                )
                found[name].append(analyzer.load_pairwise_scores(str(number))["all_modules"].numpy())
        print(f"{path.name} scored", flush=True)
    one = {f"kronfluence, {name}": scores[0] for name, scores in found.items()}
    every = {f"kronfluence, {name}, {len(paths)} models": np.mean(scores, axis=0) for name, scores in found.items()}
    return one | every


def traker(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Score by TRAK, one checkpoint and all."""
    from trak import TRAKer

    found = {}
    for count in (1, len(paths)):
        with tempfile.TemporaryDirectory() as folder:
            scorer = TRAKer(
                model=load(paths[0]),
                task="image_classification",
                train_set_size=len(x),
                save_dir=folder,
                device="cpu",
                proj_dim=DIMENSION,
                use_half_precision=False,
                logging_level=logging.ERROR,
            )
            states = [torch.load(path, weights_only=True) for path in paths[:count]]
            for number, state in enumerate(states):
                scorer.load_checkpoint(state, model_id=number)
                for inputs, targets in zip(x.split(1000), y.split(1000), strict=True):
                    scorer.featurize((inputs, targets), num_samples=len(inputs))
            scorer.finalize_features()
            for number, state in enumerate(states):
                scorer.start_scoring_checkpoint("tests", state, model_id=number, num_targets=len(test_x))
                scorer.score((test_x, test_y), num_samples=len(test_x))
            name = "TRAK" if count == 1 else f"TRAK, {count} models"
            found[name] = np.array(scorer.finalize_scores("tests").T)
        print(f"{name} scored", flush=True)
    return found


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["kronfluence", "traker"])
    parser.add_argument("folder", type=Path)
    words = parser.parse_args()
    with np.load(words.folder / "case.npz") as case:
        arrays = [torch.from_numpy(case[name]) for name in ("x", "y", "test_x", "test_y")]
    paths = sorted(words.folder.glob("model-*.pt"))
    found = {"kronfluence": kronfluence, "traker": traker}[words.peer](*arrays, paths)
    np.savez(words.folder / f"{words.peer}.npz", **found)


if __name__ == "__main__":
    main()
