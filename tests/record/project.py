"""Make the project that is recorded on: a quarter of the demo, with its trained checkpoint and without a store."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

# What the demo's own commands have written; the recording writes it again.
WRITTEN = ("influence.h5", "rank.html", "mislabels.html")


def make_project(folder: Path, environment: dict[str, str]) -> None:
    """Run ``influence demo`` at ``folder`` and keep a quarter of its images.

    Args:
        folder: must not exist.
        environment: its PATH has the command ``influence``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    done = subprocess.run(
        ["influence", "demo", draft.name],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"influence demo ended with {done.returncode}:\n{done.stderr}")
    keep_a_quarter(draft)
    draft.rename(folder)


def keep_a_quarter(folder: Path) -> None:
    """Keep every fourth training image, every second test image, their truth; add a person's decisions."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    for split, every in (("train", 4), ("test", 2)):
        for path in sorted((folder / split).glob("*/*.png")):
            # The README copies the shirts whose numbers begin with 050.
            if int(path.stem) % every and not path.match("test/Shirt/050*.png"):
                path.unlink()
    with (folder / "truth.csv").open(encoding="utf-8") as file:
        wrong = {row["path"]: row for row in csv.DictReader(file)}
    truth, decisions = ["index,path,label,true_label"], ["index,path,label,new_label,decision"]
    # ImageFolder counts through class folders by name, then through file names.
    for index, path in enumerate(sorted((folder / "train").glob("*/*.png"), key=lambda p: (p.parent.name, p.name))):
        row = wrong.get(str(path.relative_to(folder)))
        if row is not None:
            line = f"{index},{row['path']},{row['label']},{row['true_label']}"
            truth.append(line)
            decisions.append(f"{line},relabel")
    (folder / "truth.csv").write_text("\n".join(truth) + "\n", encoding="utf-8")
    (folder / "decisions.csv").write_text("\n".join(decisions) + "\n", encoding="utf-8")
