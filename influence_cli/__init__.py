"""Dataset debugger for image classifiers: which training images made the model say this, and which labels are wrong.

What a command does is one call to a function here that returns arrays. Names are loaded when first used, so that
importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "InfluenceError": "errors",
    "load_config": "config.load",
    "load_tasks": "model.task",
    "check_run": "precompute.check",
    "prepare_all": "precompute.prepare",
    "Upkeep": "precompute.prepare",
    "select_tests": "influence.test_selection",
    "rank_training": "ranking.rank",
    "RankOptions": "ranking.rank",
    "rank_tests": "ranking.rank",
    "group_influence": "ranking.groups",
    "group_by_class": "ranking.group_files",
    "read_groups": "ranking.group_files",
    "find_mislabels": "mislabels.find",
    "SignalChoice": "mislabels.find",
    "find_duplicates": "inspection.duplicates",
    "find_issues": "inspection.issues",
    "apply_decisions": "relabel.labels",
    "Debugger": "notebook.debugger",
    "Recorder": "recording.recorder",
    "Retraining": "retrain.retraining",
    "check_estimates": "retrain.self_check",
    "leave_one_out": "retrain.leave_one_out",
    "datamodeling_score": "retrain.lds",
    "LdsPlan": "retrain.random_subsets",
    "perturb_image": "perturb.estimate",
    "attack_prediction": "perturb.attack",
    "rank_attackable": "perturb.attack",
    "read_result": "results.reader",
    "compare_results": "results.compare",
    "measure_distances": "results.distances",
    "Store": "store.store",
    "Terminal": "runtime.terminal",
}

# Old name: new name. Both work for one release.
_ALIASES = {"select": "select_tests"}

__all__ = ["__version__", *_HOMES, *_ALIASES]


def __getattr__(name: str) -> Any:
    name = _ALIASES.get(name, name)
    if name in _HOMES:
        return getattr(import_module(f"influence_cli.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
