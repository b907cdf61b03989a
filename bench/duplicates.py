"""How well `influence duplicates` finds copies: planted ones by kind, and those that CIFAR-10 is known to have.

    .venv/bin/python bench/duplicates.py [--part planted|cifar10] [--work FOLDER] [--pairs FILE]

Planted: to 4,000 images of a set come 400 copies, 100 each by JPEG at quality 50, a crop of 90% of the side at a random
place and enlarged again, a brightness of 0.7 or 1.3, and a flip. Pairs are found by pixels alone; a network adds
candidates, which have to pass the same check. A pair of a planted image is right if the other one is its source, or a
copy of the source in the set without planted ones; all other pairs of it are wrong.

CIFAR-10: all 60,000 images and the ResNet-20 that came with its own weights. --pairs is meta/duplicates_cifar10.csv of
github.com/cvjena/cifair (Barz & Denzler 2020): test images and their training images, judged by people as exact (0),
near-duplicate (1) or very similar (2). Beside it: the test accuracy with and without the test images that are found.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from public_data import need

from influence_cli.inspection.copies import find_links
from influence_cli.inspection.pictures import SIDE, joined
from influence_cli.metrics import binomial_interval

IMAGES, PLANTED, SEEDS = 4_000, 100, 2
SETS = ("mnist", "fashion-mnist", "cifar10")
JUDGED = {0: "exact", 1: "near-duplicate", 2: "very similar"}

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    """Compress to JPEG at quality 50."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert(picture.mode)


def crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out 90% of the side at a random place, and enlarge it again."""
    side = round(0.9 * picture.width)
    left, top = rng.integers(0, picture.width - side + 1, 2).tolist()
    return picture.crop((left, top, left + side, top + side)).resize(picture.size, Image.Resampling.BILINEAR)


def brightness(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Darken to 0.7 or brighten to 1.3, cut off at white."""
    values = np.asarray(picture, dtype=np.float64) * rng.choice([0.7, 1.3])
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def flip(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    """Turn left and right round."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


KINDS: dict[str, Change] = {"JPEG at 50": jpeg, "crop of 90%": crop, "brightness": brightness, "flip": flip}


def read(name: str, seed: int) -> list[Image.Image]:
    """Draw images of a training set."""
    if name == "cifar10":
        tiles = np.asarray(Image.open(need(name) / f"data_batch_{1 + seed % 5}.webp"))
        images = tiles.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    else:
        with gzip.open(next(need(name).rglob("train-images*.gz"))) as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    rows = np.random.default_rng(seed).choice(len(images), IMAGES, replace=False)
    return [Image.fromarray(images[row]) for row in np.sort(rows)]


def pairs_among(pictures: list[Image.Image]) -> set[tuple[int, int]]:
    """Find the pairs of copies, by pixels alone."""
    resized = [picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures]
    small = torch.from_numpy(np.stack([np.array(one) for one in resized])).permute(0, 3, 1, 2).contiguous()
    hashes = np.array([hash(picture.tobytes()) for picture in pictures]).astype(np.uint64)
    return {(int(a), int(b)) for a, b in find_links(joined([small]), hashes, None).pairs}


def planted() -> None:
    """Print recall by kind, and precision."""
    print("| set | " + " | ".join(KINDS) + " | pairs with a planted image | precision | other pairs | seconds |")
    print("|---|" + "---|" * (len(KINDS) + 4))
    for name in SETS:
        hits, seconds = dict.fromkeys(KINDS, 0), []
        right = total = natural = 0
        for seed in range(SEEDS):
            pictures, rng = read(name, seed), np.random.default_rng(seed)
            before = pairs_among(pictures)
            sources = rng.choice(IMAGES, len(KINDS) * PLANTED, replace=False).tolist()
            kinds = [kind for kind in KINDS for _ in range(PLANTED)]
            copies = [KINDS[kind](pictures[source], rng) for kind, source in zip(kinds, sources, strict=True)]
            started = time.perf_counter()
            pairs = pairs_among(pictures + copies)
            seconds.append(time.perf_counter() - started)
            twins = {(a, b) for pair in before for a, b in (pair, pair[::-1])}
            origin = [*range(IMAGES), *sources]
            for number, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
                hits[kind] += (source, IMAGES + number) in pairs
            of_planted = [(origin[a], origin[b]) for a, b in pairs if b >= IMAGES]
            right += sum(a == b or (a, b) in twins for a, b in of_planted)
            total, natural = total + len(of_planted), natural + len(before)
        cells = [f"{hits[kind] / (SEEDS * PLANTED):.3f} ({interval(hits[kind], SEEDS * PLANTED)})" for kind in KINDS]
        precision = f"{right / total:.4f} ({interval(right, total)})"
        row = [name, *cells, f"{total:,}", precision, f"{natural:,}", f"{np.median(seconds):.0f}"]
        print("| " + " | ".join(row) + " |", flush=True)


def interval(hits: int, count: int) -> str:
    """Write the 95% interval of a share."""
    low, high = binomial_interval(hits, count)
    return f"{low:.3f}–{high:.3f}"


def cifar10(work: Path, judged: Path | None) -> None:
    """Print the test images that are found in the training set, beside the published ones, and what they are worth."""
    from mislabels import write_foreign

    from influence_cli import Terminal, load_config, load_tasks
    from influence_cli.inspection.duplicates import find_duplicates

    write_foreign(work)
    (task,) = load_tasks(load_config(work / "influence.yaml"))
    started = time.perf_counter()
    result = find_duplicates(task, Terminal(verbose=True))
    seconds = time.perf_counter() - started
    leaked = {place.index for group in result.groups if group.leaks for place in group.places if place.split == 1}
    print(f"{len(result.groups):,} groups; {len(leaked):,} test images in the training set; {seconds:,.0f} s\n")
    whole, without, on_them = result.leak.accuracies
    print(f"Test accuracy {whole:.2%}; without these {without:.2%}; on these {on_them:.2%}\n")
    np.save(work / "leaked.npy", np.array(sorted(leaked)))
    if judged is None:
        return
    rows = list(csv.DictReader(judged.read_text().splitlines()))
    known = {int(row["TestID"]): int(row["Judgment"]) for row in rows}
    print("| judged by people | test images | found |\n|---|---|---|")
    for number, name in JUDGED.items():
        test = [index for index, judgment in known.items() if judgment == number]
        print(f"| {name} | {len(test)} | {sum(index in leaked for index in test)} |")
    print(f"| not on the list | | {len(leaked - set(known))} |")
    print(f"\nNot on the list: {sorted(leaked - set(known))}")


def main() -> None:
    """Print both parts, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("planted", "cifar10"))
    parser.add_argument("--work", type=Path, help="where the project of CIFAR-10 goes")
    parser.add_argument("--pairs", type=Path, help="the published pairs of CIFAR-10, as .csv")
    words = parser.parse_args()
    if words.part in (None, "planted"):
        print("### Planted copies\n")
        planted()
    if words.part in (None, "cifar10"):
        print("\n### CIFAR-10\n")
        with tempfile.TemporaryDirectory() as folder:
            cifar10(words.work or Path(folder), words.pairs)


if __name__ == "__main__":
    main()
