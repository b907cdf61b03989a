"""groups: sums against a dense computation, removal against real retraining, and files that do not line up."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder

from influence_cli.influence import example_facts
from influence_cli.influence.run_facts import ScoreRecord
from influence_cli.metrics import bootstrap_means, least_by_chance, pearson, slope
from influence_cli.ranking.group_files import Grouping
from influence_cli.ranking.groups import Doubt, GroupInfluence, GroupSink, retrained, verdict
from tests.conftest import Command, edit

COLUMNS = [
    "test", "test_path", "test_label", "test_predicted", "effect", "rank", "group", "examples",
    "influence", "mean_influence", "harmful_share", "first",
]  # fmt: skip


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def column(rows: list[dict[str, object]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def write_csv(path: Path, header: list[str], rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def sites(project: Path, count: int = 320, values: int = 8) -> np.ndarray:
    """Write sites.csv with a random site for each example, in a random order of rows; give the sites."""
    generator = np.random.default_rng(3)
    site = generator.integers(0, values, count)
    rows = [(int(index), f"site {site[index]}") for index in generator.permutation(count)]
    write_csv(project / "sites.csv", ["index", "site"], rows)
    return site


class Dense:
    """The project's softmax regression in float64: data, weights, and influence by a dense inverse."""

    def __init__(self, project: Path) -> None:
        (self.x, self.y), (self.x_test, self.y_test) = (self._read(project / part) for part in ("train", "test"))
        state = torch.load(project / "model.pt")
        self.w = torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).double()
        self.wrong = torch.nonzero((self.x_test @ self.w.T).argmax(dim=1) != self.y_test).flatten().tolist()

    @staticmethod
    def _read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        data = ImageFolder(folder)
        x = torch.stack([torch.tensor(np.array(image.convert("L"))).float() / 255 for image, _ in data])
        x = nn.functional.avg_pool2d(x[:, None], 4).flatten(1).double()
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), torch.tensor(data.targets)

    def influence(self, tests: list[int], l2: float = 0.01) -> np.ndarray:
        """influence[t, i] = (1/n) g_tᵀ (H + l2)⁻¹ gᵢ."""

        def gradients(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            slopes = (x @ self.w.T).softmax(dim=1) - nn.functional.one_hot(y, 10)
            return torch.einsum("bc,bd->bcd", slopes, x).flatten(1)

        p = (self.x @ self.w.T).softmax(dim=1)
        bend = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        h = torch.einsum("bce,bd,bf->cdef", bend, self.x, self.x).reshape(500, 500) / len(self.x)
        h += l2 * torch.eye(500, dtype=torch.float64)
        s = torch.linalg.solve(h, gradients(self.x_test[tests], self.y_test[tests]).T).T
        return (s @ gradients(self.x, self.y).T / len(self.x)).numpy()

    def mean_loss_without(self, tests: list[int], gone: np.ndarray, l2: float = 0.01) -> float:
        """Minimise (1/n) Σ_{j not gone} ℓ + l2/2‖W‖² with the same n, and give the mean loss of test examples."""
        kept = torch.ones(len(self.x), dtype=torch.float64)
        kept[torch.from_numpy(gone)] = 0
        w = self.w.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [w], max_iter=300, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(self.x @ w.T, self.y, reduction="none")
            value = (kept * losses).sum() / len(self.x) + l2 / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            return float(nn.functional.cross_entropy(self.x_test[tests] @ w.T, self.y_test[tests]))


# Sums


def test_sums_by_class_are_those_of_a_dense_loop(influence: Command, project: Path) -> None:
    rows = rows_of(influence("groups", cwd=project).out)
    assert list(rows[0]) == COLUMNS
    dense = Dense(project)
    mean = dense.influence(dense.wrong).mean(axis=0)
    classes = ImageFolder(project / "train").classes
    assert sorted(str(row["group"]) for row in rows) == sorted(classes)
    harm = sum(min(value, 0.0) for value in mean)
    for row in rows:
        members = [i for i, y in enumerate(dense.y.tolist()) if classes[y] == row["group"]]
        total = sum(mean[i] for i in members)
        assert row["examples"] == len(members)
        assert row["influence"] == pytest.approx(total, rel=1e-3, abs=1e-6)
        assert row["mean_influence"] == pytest.approx(total / len(members), rel=1e-3, abs=1e-8)
        assert row["harmful_share"] == pytest.approx(sum(min(mean[i], 0.0) for i in members) / harm, rel=1e-3)
        assert row["effect"] == ("helpful" if total > 0 else "harmful")
        assert row["test"] is None
    values = column(rows, "influence").tolist()
    assert values == sorted(values)
    assert [row["rank"] for row in rows] == list(range(1, 11))
    assert column(rows, "harmful_share").sum() == pytest.approx(1)
    assert column(rows, "first").sum() == pytest.approx(1)


def test_sums_by_a_metadata_column_are_those_of_rank(influence: Command, project: Path) -> None:
    site = sites(project)
    rows = rows_of(influence("groups", 3, 17, "40:44", "--metadata", "sites.csv", "--by", "site", cwd=project).out)
    influence("rank", 3, 17, "40:44", "--matrix", "m.h5", "-q", cwd=project)
    with h5py.File(project / "m.h5") as file:
        mean = np.asarray(file["influence"]).mean(axis=0)
    for row in rows:
        assert row["influence"] == pytest.approx(mean[site == int(str(row["group"])[5:])].sum(), rel=1e-4, abs=1e-8)


def test_each_gives_rows_a_test_example_whose_mean_is_the_sum(influence: Command, project: Path) -> None:
    sites(project)
    words = ("3", "17", "--metadata", "sites.csv")
    each = rows_of(influence("groups", *words, "--each", cwd=project).out)
    mean = {row["group"]: row["influence"] for row in rows_of(influence("groups", *words, cwd=project).out)}
    assert [row["test"] for row in each] == [3] * 8 + [17] * 8
    assert all(row["first"] is None for row in each)
    for group, value in mean.items():
        both = [float(str(row["influence"])) for row in each if row["group"] == group]
        assert sum(both) / 2 == pytest.approx(value, abs=1e-8)
    one = rows_of(influence("groups", 3, "--metadata", "sites.csv", "--top", 2, cwd=project).out)
    assert [row["group"] for row in one] == [row["group"] for row in each[:2]]


def test_the_share_of_each_test_example_is_of_its_own_harm(influence: Command, project: Path) -> None:
    each = rows_of(influence("groups", 3, 17, "--each", cwd=project).out)
    assert len(each) == 20
    dense = Dense(project)
    harm = dict(zip((3, 17), np.minimum(dense.influence([3, 17]), 0), strict=True))
    labels, classes = dense.y.numpy(), ImageFolder(project / "train").classes
    for row in each:
        own = harm[int(str(row["test"]))]
        share = own[labels == classes.index(str(row["group"]))].sum() / own.sum()
        assert row["harmful_share"] == pytest.approx(share, rel=1e-3)


def test_the_errors_on_one_class(influence: Command, project: Path) -> None:
    dense, classes = Dense(project), ImageFolder(project / "train").classes
    name = classes[int(dense.y_test[dense.wrong[0]])]
    tests = [t for t in dense.wrong if classes[int(dense.y_test[t])] == name]
    done = influence("groups", "--of", name, cwd=project)
    given = influence("groups", *tests, cwd=project)
    assert [(row["group"], row["influence"]) for row in rows_of(done.out)] == [
        (row["group"], pytest.approx(row["influence"])) for row in rows_of(given.out)
    ]
    refused = influence("groups", "0:1", "--of", "Bag" if name != "Bag" else "Coat", cwd=project, code=2)
    assert "has the label" in refused.err or int(dense.y_test[0]) == classes.index("Bag")
    unknown = influence("groups", "--of", "Bagg", cwd=project, code=2)
    assert "--of: there is no class 'Bagg'" in unknown.err
    assert "did you mean 'Bag'?" in unknown.err


def test_on_the_fly_and_without_what_cannot_be_read(influence: Command, project: Path) -> None:
    bad = sorted((project / "train" / "Bag").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:90])
    stored = rows_of(influence("groups", 3, "--skip-unreadable", cwd=project).out)
    direct = rows_of(influence("groups", 3, "--skip-unreadable", "--on-the-fly", cwd=project).out)
    assert np.allclose(column(stored, "influence"), column(direct, "influence"), rtol=1e-3, atol=1e-6)
    assert column(stored, "examples").sum() == column(direct, "examples").sum() == 319


# Retraining


@pytest.mark.slow
def test_removing_a_group_for_real_is_in_proportion_to_its_influence(influence: Command, project: Path) -> None:
    """Of real images: forty groups of 8, whose removal is a small step; and the actual effects of a float64 LBFGS."""
    site = sites(project, values=18)
    dense = Dense(project)
    done = influence("groups", "--metadata", "sites.csv", "--retrain", "--all", cwd=project)
    rows = rows_of(done.out)
    assert list(rows[0]) == [*COLUMNS, "actual"]
    estimated, actual = column(rows, "influence"), column(rows, "actual")
    assert pearson(estimated, actual) > 0.95
    assert 0.8 < slope(estimated, actual) < 1.6
    assert "estimated and actual effect of 18 groups: r = 0.9" in done.err
    before = dense.mean_loss_without(dense.wrong, np.empty(0, np.int64))
    for row in (rows[0], rows[-1]):
        gone = np.flatnonzero(site == int(str(row["group"])[5:]))
        truth = dense.mean_loss_without(dense.wrong, gone) - before
        assert row["actual"] == pytest.approx(truth, rel=1e-3)


@pytest.mark.slow
def test_a_network_is_retrained_without_groups_by_its_training_function(influence: Command, project: Path) -> None:
    (project / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 10))\n\n\n"
        "def train(model, data, *, l2, seed, progress):\n"
        "    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])\n"
        "    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40, line_search_fn='strong_wolfe')\n\n"
        "    def closure():\n"
        "        optimizer.zero_grad()\n"
        "        loss = nn.functional.cross_entropy(model(x), y)\n"
        "        loss = loss + l2 / 2 * sum(p.square().sum() for p in model.parameters())\n"
        "        loss.backward()\n"
        "        return loss\n\n"
        "    optimizer.step(closure)\n"
        "    return model\n"
    )
    refused = influence("groups", 3, "--retrain", "-s", "model.checkpoint=null", cwd=project, code=2)
    assert refused.err.startswith("error: ")
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 10))
    torch.save(model.state_dict(), project / "model.pt")
    missing = influence("groups", 3, "--retrain", cwd=project, code=2)
    assert "retraining needs a training function" in missing.err
    with (project / "influence.yaml").open("a") as file:
        file.write("training: {factory: ./model.py:train}\n")
    sites(project, values=3)
    words = ("groups", 3, "--metadata", "sites.csv", "--retrain")
    rows = rows_of(influence(*words, cwd=project).out)
    assert len(list((project / "influence.retrained" / "without").glob("without_group_*.npz"))) == 3
    assert all(np.isfinite(column(rows, "actual")))
    again = influence(*words, cwd=project)
    assert "4 of 4 retrainings are already in" in again.err
    assert rows_of(again.out) == rows


# Metadata files


def test_rows_are_found_by_path_wherever_the_project_lies(influence: Command, project: Path) -> None:
    site = sites(project)
    expected = influence("groups", 3, "--metadata", "sites.csv", cwd=project).out
    paths = [Path(path) for path, _ in ImageFolder(project / "train").samples]
    shapes = {
        "absolute": [str(path) for path in paths],
        "from the project": [str(path.relative_to(project)) for path in paths],
        "from the root": [str(path.relative_to(project / "train")) for path in paths],
        "from elsewhere": [f"/mnt/data/{path.relative_to(project)}" for path in paths],
        "names alone": [path.name for path in paths],
    }
    for shape, cells in shapes.items():
        rows = [(cell, f"site {site[i]}") for i, cell in enumerate(cells)][::-1]
        write_csv(project / "by_path.csv", ["path", "site"], rows)
        assert influence("groups", 3, "--metadata", "by_path.csv", cwd=project).out == expected, shape


def test_rows_of_excluded_examples_may_be_there_or_not(influence: Command, project: Path) -> None:
    sites(project)
    np.save(project / "out.npy", np.array([0, 5, 319]))
    words = ("-s", "train.exclude=out.npy", "--metadata", "sites.csv")
    rows = rows_of(influence("groups", 3, *words, cwd=project).out)
    assert column(rows, "examples").sum() == 317
    lines = (project / "sites.csv").read_text().splitlines()
    kept = [line for line in lines if line.partition(",")[0] not in ("0", "5", "319")]
    (project / "sites.csv").write_text("\n".join(kept) + "\n")
    assert rows_of(influence("groups", 3, *words, cwd=project).out) == rows


def test_a_file_that_does_not_line_up_is_refused_with_the_counts(influence: Command, project: Path) -> None:
    rows: list[tuple[object, ...]] = [(i, i % 3) for i in range(2, 320)]
    write_csv(project / "sites.csv", ["index", "site"], [*rows, (7, 1), (320, 0), (-1, 0), (400, 2)])
    done = influence("groups", 3, "--metadata", "sites.csv", cwd=project, code=2)
    first, second = done.err.splitlines()[-2:]
    assert first.startswith("error: --metadata: sites.csv does not match the training set: 322 rows, 320 exam")
    assert "2 missing (such as training example 0 (" in first
    assert "3 unknown (such as line 321: '320')" in first
    assert "1 listed twice (such as training example 7 (" in first
    assert "one row per training example" in second
    # The test set has files of the same name: they are other files.
    twin = project / "test" / "Bag" / "00000.png"
    Image.new("L", (28, 28)).save(twin)
    paths = [path for path, _ in ImageFolder(project / "train").samples]
    write_csv(project / "p.csv", ["path", "site"], [(path, i % 2) for i, path in enumerate(paths[1:])] + [(twin, 1)])
    assert "1 missing" in influence("groups", 3, "--metadata", "p.csv", cwd=project, code=2).err
    assert "1 unknown" in influence("groups", 3, "--metadata", "p.csv", cwd=project, code=2).err


def test_index_and_path_have_to_agree(influence: Command, project: Path) -> None:
    paths = [path for path, _ in ImageFolder(project / "train").samples]
    paths[7], paths[8] = paths[8], paths[7]
    write_csv(project / "both.csv", ["index", "path", "site"], [(i, path, i % 2) for i, path in enumerate(paths)])
    done = influence("groups", 3, "--metadata", "both.csv", cwd=project, code=2)
    assert "both.csv:9: index 7 is" in done.err


@pytest.mark.parametrize(
    ("header", "value", "words", "message", "hint"),
    [
        (["index", "site"], lambda i: i % 3, ("--by", "sight"), "has no such column", "did you mean 'site'?"),
        (["index", "age"], lambda i: i / 7, ("--by", "age"), "320 different numbers for 320 examples", "into ranges"),
        (["index", "id"], lambda i: f"x{i}", ("--by", "id"), "320 different values for 320 examples", "influence rank"),
        (["index", "site"], lambda _: "A", (), "has the value 'A' for every example", "another column"),
        (["number", "site"], lambda i: i % 3, (), "none of them names the example", "index"),
        (["index", "index"], lambda i: i % 3, (), "the column 'index' appears twice", ""),
    ],
)  # fmt: skip
def test_columns_that_make_no_groups(
    influence: Command, project: Path, header: list[str], value: object, words: tuple[str, ...], message: str, hint: str
) -> None:
    write_csv(project / "m.csv", header, [(i, value(i)) for i in range(320)])  # type: ignore[operator]
    done = influence("groups", 3, "--metadata", "m.csv", *words, cwd=project, code=2)
    assert message in done.err
    assert hint in done.err
    assert len([line for line in done.err.splitlines() if line.startswith(("error", "  "))]) <= 2


def test_several_columns_need_by_and_blank_cells_are_a_group(influence: Command, project: Path) -> None:
    rows: list[tuple[object, ...]] = [(i, "" if i % 4 == 0 else "A", i % 2) for i in range(320)]
    write_csv(project / "m.csv", ["index", "site", "odd"], rows)
    done = influence("groups", 3, "--metadata", "m.csv", cwd=project, code=2)
    assert "--by must name the column to group by" in done.err
    assert "there are: site, odd" in done.err
    found = rows_of(influence("groups", 3, "--metadata", "m.csv", "--by", "site", cwd=project).out)
    assert {(row["group"], row["examples"]) for row in found} == {("(blank)", 80), ("A", 240)}


def test_other_bad_input_is_told_in_a_line(influence: Command, project: Path) -> None:
    for words, message in (
        (("--by", "site"), "without --metadata the groups are classes"),
        (("--metadata", "none.csv"), "there is no file none.csv"),
        (("--metadata", "model.pt"), "is not a .csv"),
        (("--retrain", "--skip-unreadable"), "--retrain trains on every example"),
        (("--report", "page.txt"), "a page must be .html"),
        (("--target", "Bagg"), "there is no class"),
    ):
        done = influence("groups", 3, *words, cwd=project, code=2)
        assert message in done.err, done.err
        assert done.out == ""


# What is said and written


def test_the_group_that_drives_the_errors_is_named(influence: Command, project: Path) -> None:
    """Every label of a site is wrong: whatever else there is, removing it would help most."""
    edit(project, "  args: {root: train}", "  args: {root: train}\n  labels: labels.csv")
    labels = np.array(ImageFolder(project / "train").targets)
    bad = np.random.default_rng(0).permutation(320)[:40]
    labels[bad] = (labels[bad] + 1 + np.arange(40) % 9) % 10
    write_csv(project / "labels.csv", ["index", "label"], [(i, int(y)) for i, y in enumerate(labels)])
    from tests.conftest import save_minimum

    save_minimum(project, labels=labels)
    write_csv(project / "m.csv", ["index", "site"], [(i, "bad" if i in bad else f"good {i % 4}") for i in range(320)])
    words = ("groups", "0:80", "--metadata", "m.csv", "--retrain", "--report", "g.html", "-o", "g.csv")
    done = influence(*words, cwd=project)
    with (project / "g.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["group"] == "bad"
    assert float(rows[0]["actual"]) < 0
    assert float(rows[0]["first"]) == 1
    sentence = next(line for line in done.err.splitlines() if "drives" in line)
    assert re.fullmatch(
        r"bad drives these 80 test examples: without its 40 examples their mean loss would be about [\d.]+ nats lower; "
        r"they have \d+% of all harmful influence; first in 100% of 1,000 resamples of the test examples",
        sentence,
    )
    run = json.loads((project / "g.csv.run.json").read_text())
    assert run["verdict"] == sentence
    assert run["groups"] == {"by": "site", "groups": 5, "test_examples": 80, "worst_by_chance": 0.0}
    assert run["retrain"]["r"] > 0.9
    assert run["retrain"]["verdict"] in done.err
    assert "retraining agrees: without bad the mean loss changes by -" in done.err
    page = (project / "g.html").read_text()
    assert "Most harmful in site: bad" in page
    assert "good 3" in page
    assert page.count("<img") >= 10
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_what_is_not_clear_is_said(influence: Command, project: Path) -> None:
    """Sites are drawn at random: some is first, none drives anything."""
    sites(project)
    words = ("--metadata", "sites.csv")
    for tests in (("3", "17"), ("0:80",)):
        said = influence("groups", *tests, *words, cwd=project).err
        assert "is the most harmful group to these" in said
        assert "likely, not certain: " in said
        assert "harmful in" in said
    alone = influence("groups", 0, *words, cwd=project).err
    assert "the worst of random groups of these sizes is as harmful in" in alone
    assert "drives" not in alone
    assert "no group as a whole is harmful to" in influence("groups", 6, *words, cwd=project).err


def test_where_retraining_finds_another_group_that_is_said() -> None:
    test = example_facts.TestFacts(0, None, 0, 0, 0, 1.0, 1.0, 1.0)
    sums = np.array([[-2.0, -0.5, 1.0]])
    found = GroupInfluence(
        Grouping("site", ("a", "b", "c"), np.arange(3)), [test], sums, sums, sums[0], ScoreRecord(())
    )
    assert retrained(found, {0: np.array([-0.3]), 1: np.array([-0.1])}).startswith("retraining agrees: without a ")
    said = retrained(found, {0: np.array([0.1]), 1: np.array([-0.2])})
    assert said.startswith("retraining disagrees: without b the mean loss changes by -0.2, without a by +0.1; ")
    beyond = verdict(found, Doubt(None, None, 0.0), " nats")
    assert "2 nats lower (it is 1 now: trust the ranking, not the number" in beyond


def test_bootstrap_draws_rows_and_chance_deals_values() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal([0.0, -1.0], [1.0, 0.5], (400, 2))
    means = bootstrap_means(values)
    assert means.shape == (1000, 2)
    assert np.allclose(means.mean(axis=0), values.mean(axis=0), atol=0.01)
    assert np.allclose(means.std(axis=0), values.std(axis=0) / 20, rtol=0.1)
    chance = least_by_chance(values[:, 0], np.arange(400) % 4)
    # Four sums of 100 of 400 without replacement: the least is 1.03·10 below their mean, as of four independent ones.
    assert -11.5 < chance.mean() - values[:, 0].sum() / 4 < -9.5


def test_memory_is_that_of_the_sums_not_of_all_pairs() -> None:
    tests, examples, piece = 200, 100_000, 500
    grouping = Grouping("site", tuple("abcd"), np.arange(examples) % 4)
    test = example_facts.TestFacts(0, None, 0, 0, 0, 0.0, 1.0, 1.0)
    tracemalloc.start()
    sink = GroupSink(grouping)
    sink.begin([test] * tests)
    for start in range(0, examples, piece):
        sink.add(slice(start, start + piece), np.full((tests, piece), -1.0, dtype=np.float32))
    found = sink.result(grouping, [test] * tests, ScoreRecord(()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.total().influence.tolist() == [-25_000.0] * 4
    assert peak < 10e6 < 4 * tests * examples / 2
