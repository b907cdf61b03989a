"""Dotted names that a config may hold from before the package had folders. They work for one release."""

from __future__ import annotations

from collections.abc import Callable


def _keep_silent(_: str) -> None:
    """Say nothing: only a command has somebody to tell."""


# Takes the line about a name that has moved; the command line has it printed.
tell: Callable[[str], None] = _keep_silent
# Old name: new name, both below influence_cli.
MOVED = {
    "parquet_images.ParquetImages": "data.parquet_images.ParquetImages",
    "tar_images.TarImages": "data.tar_images.TarImages",
    "config.load_config": "load_config",
    "task.load_tasks": "load_tasks",
    "check.check_run": "check_run",
    "precompute.prepare_all": "prepare_all",
    "selection.select": "select_tests",
    "rank.rank_training": "rank_training",
    "rank.rank_tests": "rank_tests",
    "groups.group_influence": "group_influence",
    "group_files.group_by_class": "group_by_class",
    "group_files.read_groups": "read_groups",
    "mislabels.find_mislabels": "find_mislabels",
    "relabel.apply_decisions": "apply_decisions",
    "self_check.check_estimates": "check_estimates",
    "loo.leave_one_out": "leave_one_out",
    "datamodeling.datamodeling_score": "datamodeling_score",
    "perturb.perturb_image": "perturb_image",
    "attack.attack_prediction": "attack_prediction",
    "attack.rank_attackable": "rank_attackable",
    "result_files.read_result": "read_result",
    "compare.compare_results": "compare_results",
    "distances.measure_distances": "measure_distances",
    "store.Store": "Store",
    "terminal.Terminal": "Terminal",
}


def new_name(name: str) -> str | None:
    """Give the name that an object of this project has today, or None if it did not move.

    Args:
        name: a dotted name of a config.
    """
    package, _, rest = name.partition(".")
    return f"{package}.{MOVED[rest]}" if package == "influence_cli" and rest in MOVED else None
