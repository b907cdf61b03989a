"""The pages in a real headless Chromium, from disk with the network off: images, filter, sort, keys, files."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from influence_cli.pictures import thumbnail
from influence_cli.report.charts import scatter
from influence_cli.report.html import Card, CardRow, Desk, Page, PageTable, Review, Section, write_page
from tests.conftest import Command, Opened, Visit

COLUMNS = ["index", "path", "label", "decision", "new_label"]
# What a data set may hold that a page, a CSV or a terminal has to survive.
HOSTILE = (
    '<img src=x onerror="document.title=1">',
    "</script><script>document.title='owned'</script>",
    "line\nbreak",
    'quote"comma,semi;',
    "=cmd|'/c calc'!A1",
    "emoji 🐜",
    "עברית \u202eright",
    "'=guarded",
)


def desk_page(classes: tuple[str, ...] = ("ant", "bee", "cat"), key: str = "k", count: int = 8) -> Page:
    """Eight examples: number i is labelled with class i mod C, the next class is suggested; the last as it is."""
    cards = []
    for index in range(count):
        label = classes[index % len(classes)]
        suggested = classes[(index + 1) % len(classes)] if index < count - 1 else label
        image = thumbnail(Image.fromarray(np.full((8, 8, 3), 20 * index, dtype=np.uint8)))
        review = Review(index, f"/data/{label}/{index}.png", label, suggested)
        facts = (("index", str(index)),)
        cards.append(Card(image, f"example {index}", label, facts, "suspect", label, (), review))
    table = PageTable("Classes", ("label", "examples"), (("ant", "10"), ("bee", "9"), ("cat", "100")))
    sections = (Section("Labels", None, (CardRow("", "", tuple(cards)),)),)
    desk = Desk(key, "train", 6000, classes)
    return Page("desk", "S", ("M",), table, sections, None, (), (), (), "influence mislabels", "{}", desk)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `desk_page`; do not change it."""
    path = tmp_path_factory.mktemp("desk") / "desk.html"
    write_page(desk_page(), path)
    return path


@pytest.fixture
def desk(visit: Visit, written: Path) -> Opened:
    return visit(written)


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def test_buttons_decide_and_say_so(desk: Opened) -> None:
    desk.card(0).get_by_text("Keep").click()
    desk.card(1).get_by_text("→ cat").click()
    desk.card(2).get_by_text("Drop").click()
    desk.card(3).get_by_text("Unsure").click()
    assert [desk.decided(index) for index in range(5)] == ["keep", "relabel → cat", "drop", "unsure", ""]
    assert desk.progress() == "4 of 8 decided: 1 keep, 1 relabel, 1 drop, 1 unsure"
    pressed = desk.tab.locator('button[aria-pressed="true"]')
    assert pressed.all_inner_texts() == ["Keep", "→ cat", "Drop", "Unsure"]
    desk.card(0).get_by_text("Drop").click()
    assert desk.decided(0) == "drop"
    assert desk.status() == "Example 0: drop (it was keep; z undoes)."
    drop = desk.card(0).locator('[data-do="drop"]')
    # Once more takes it back.
    drop.click()
    assert (desk.decided(0), desk.status()) == ("", "Example 0: undecided.")
    drop.click()
    assert desk.tab.locator("#progress").evaluate("bar => [bar.value, bar.max]") == [4, 8]


def test_keys_decide_and_move_on(desk: Opened) -> None:
    for key in "krdu":  # the first key decides too
        desk.tab.keyboard.press(key)
    assert [desk.decided(index) for index in range(4)] == ["keep", "relabel → cat", "drop", "unsure"]
    assert desk.focused() == "4"
    # A modifier makes it the browser's, not the desk's.
    desk.tab.keyboard.press("Shift+D")
    assert desk.decided(4) == ""


def test_arrows_move_along_and_across(desk: Opened) -> None:
    desk.tab.keyboard.press("ArrowRight")
    columns = desk.tab.evaluate(
        "(() => { const cards = [...document.querySelectorAll('li[data-index]')];"
        "return cards.filter((card) => card.offsetTop === cards[0].offsetTop).length; })()"
    )
    assert 1 < columns < 8
    visited = [desk.focused()]
    for key in ("ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        desk.tab.keyboard.press(key)
        visited.append(desk.focused())
    assert visited == ["0", "1", str(1 + columns), "1", "0", "0"]


@pytest.mark.parametrize("size", [(1000, 500), (420, 800)])
def test_the_card_in_focus_is_never_under_the_bar(desk: Opened, size: tuple[int, int]) -> None:
    desk.tab.set_viewport_size({"width": size[0], "height": size[1]})
    for key in ("ArrowRight", *["ArrowDown"] * 8, *["ArrowUp"] * 8):
        desk.tab.keyboard.press(key)
        top, bar = desk.tab.evaluate(
            "(() => { const bar = document.querySelector('.bar'), fixed = getComputedStyle(bar).position === 'sticky';"
            "const end = fixed ? bar.getBoundingClientRect().bottom : 0;"
            "return [document.activeElement.getBoundingClientRect().top, end]; })()"
        )
        assert top >= bar - 1


def test_tab_stops_at_one_card(desk: Opened) -> None:
    stops = "[...document.querySelectorAll('li[data-index], li[data-index] *')].filter((one) => one.tabIndex === 0)"
    assert desk.tab.evaluate(f"new Set({stops}.map((one) => one.closest('li').dataset.index)).size") == 1
    desk.card(3).get_by_text("Keep").click()
    assert desk.tab.evaluate(f"{stops}.every((one) => one.closest('li').dataset.index === '3')")
    desk.tab.keyboard.press("Tab")
    assert desk.tab.evaluate("document.activeElement.textContent") == "→ bee"


def test_any_class_by_typing(desk: Opened) -> None:
    desk.card(0).click()
    desk.tab.keyboard.press("ArrowRight")
    desk.tab.keyboard.press("ArrowLeft")
    desk.tab.keyboard.press("c")
    desk.tab.keyboard.type("CAT")
    desk.tab.keyboard.press("Enter")
    assert desk.decided(0) == "relabel → cat"
    assert desk.focused() == "1"
    desk.tab.keyboard.press("ArrowLeft")
    desk.tab.keyboard.press("c")
    desk.tab.keyboard.type("dog")
    desk.tab.keyboard.press("Enter")
    assert desk.status() == 'There is no class "dog".'
    assert desk.decided(0) == "relabel → cat"
    assert desk.tab.locator("datalist option").evaluate_all("all => all.map((one) => one.value)") == [
        "ant",
        "bee",
        "cat",
    ]


def test_without_a_suggestion_r_asks_for_the_class(desk: Opened) -> None:
    assert desk.card(7).get_by_role("button", name="→").count() == 0
    desk.card(7).focus()
    desk.tab.keyboard.press("r")
    desk.tab.keyboard.type("ant")
    desk.tab.keyboard.press("Enter")
    assert desk.decided(7) == "relabel → ant"


def test_undo_goes_back_step_by_step(desk: Opened) -> None:
    undo = desk.tab.locator("#undo")
    assert undo.is_disabled()
    desk.card(0).get_by_text("Keep").click()
    desk.card(0).get_by_text("Drop").click()
    desk.card(1).focus()
    desk.tab.keyboard.press("u")
    desk.tab.keyboard.press("z")
    assert (desk.decided(1), desk.focused()) == ("", "1")
    undo.click()
    assert desk.decided(0) == "keep"
    desk.tab.keyboard.press("Control+z")
    assert desk.decided(0) == ""
    assert undo.is_disabled()


@pytest.mark.slow
def test_decisions_outlive_the_tab_and_the_page(desk: Opened, visit: Visit, tmp_path: Path) -> None:
    desk.card(1).get_by_text("→ cat").click()
    desk.tab.reload()
    assert desk.decided(1) == "relabel → cat"
    other = tmp_path / "again.html"
    write_page(desk_page(count=3), other)
    again = visit(other)
    assert again.decided(1) == "relabel → cat"
    # Two open tabs follow each other.
    again.card(0).get_by_text("Keep").click()
    desk.tab.wait_for_function("document.querySelector('li[data-index=\"0\"] .decided').textContent === 'keep'")
    # Other labels make another key: nothing is carried over to them.
    write_page(desk_page(key="other"), other)
    again.tab.reload()
    assert again.progress() == "0 of 8 decided"


def test_export_and_import_are_the_same_decisions(desk: Opened, tmp_path: Path) -> None:
    desk.card(2).get_by_text("Drop").click()
    desk.card(1).get_by_text("→ cat").click()
    text = desk.export()
    assert text == (
        "index,path,label,decision,new_label\n1,/data/bee/1.png,bee,relabel,cat\n2,/data/cat/2.png,cat,drop,\n"
    )
    assert desk.status() == "2 decisions exported; next: influence relabel decisions.csv"
    desk.tab.evaluate("localStorage.clear()")
    desk.tab.reload()
    assert desk.progress() == "0 of 8 decided"
    assert desk.load("\ufeff" + text.replace("\n", "\r\n"), tmp_path) == "2 decisions imported, 2 of them on this page."
    assert [desk.decided(index) for index in range(3)] == ["", "relabel → cat", "drop"]
    assert desk.export() == text
    desk.tab.click("#undo")
    assert desk.progress() == "0 of 8 decided"


def test_decisions_on_what_the_page_does_not_show_are_kept(desk: Opened, tmp_path: Path) -> None:
    text = "index,path,label,decision,new_label\n0,/data/ant/0.png,ant,keep,\n5000,/data/cat/x.png,cat,relabel,bee\n"
    assert desk.load(text, tmp_path) == "2 decisions imported, 1 of them on this page."
    assert desk.export() == text
    assert desk.status().startswith(
        "2 decisions exported (1 of them for examples that this page does not show); next: "
    )


def test_a_project_that_has_moved_is_the_same(desk: Opened, tmp_path: Path) -> None:
    text = "index,path,label,decision,new_label\n0,/elsewhere/ant/0.png,ant,drop,\n1,,bee,keep,\n"
    assert desk.load(text, tmp_path) == "2 decisions imported, 2 of them on this page."


BAD = [
    ("index,path,label,decision\n0,,ant,keep\n", "the first line is not index,path,label,decision,new_label"),
    ("", "the first line is not index,path,label,decision,new_label"),
    ("HEAD\n0,,ant,keep,\n\n1,,bee,mend,\n", 'line 4: there is no decision "mend"; known: keep, relabel, drop, unsure'),
    ("HEAD\nx,,ant,keep,\n", "line 2: x is not an index"),
    ("HEAD\n-1,,ant,keep,\n", "line 2: -1 is not an index"),
    ("HEAD\n0,,ant,relabel,dog\n", 'line 2: there is no class "dog"'),
    ("HEAD\n0,,ant,relabel,\n", 'line 2: there is no class ""'),
    ("HEAD\n0,,ant,keep,bee\n", 'line 2: keep takes no new label, but "bee" is given'),
    ("HEAD\n0,,bee,keep,\n", 'line 2: example 0 is labelled "ant" here, "bee" in the file'),
    ("HEAD\n0,,ant,keep,\n0,,ant,drop,\n", "line 3: example 0 has two decisions"),
    ("HEAD\n0,,ant,keep\n", "line 2: 4 fields, not 5"),
    ("HEAD\n0,/data/ant/7.png,ant,keep,\n", "line 2: example 0 is ant/0.png here, ant/7.png in the file"),
    ("HEAD\n6000,,ant,keep,\n", "line 2: there is no example 6000; the data set has 6000"),
    ("HEAD\n5000,,dog,keep,\n", 'line 2: there is no class "dog"'),
    ('HEAD\n0,"a\nb",ant,keep,\n1,"open,bee,keep,\n', "line 4: a quotation mark is not closed"),
]  # fmt: skip


@pytest.mark.quick("index*", "*mend*", "*dog*", "*two*")
@pytest.mark.parametrize(("text", "message"), BAD)
def test_an_import_with_a_mistake_changes_nothing(desk: Opened, tmp_path: Path, text: str, message: str) -> None:
    desk.card(0).get_by_text("Unsure").click()
    said = desk.load(text.replace("HEAD", ",".join(COLUMNS)), tmp_path)
    assert said == f"decisions.csv: {message}. Nothing was imported."
    assert desk.progress() == "1 of 8 decided: 1 unsure"


def test_filter_shows_one_label_and_the_keys_follow(desk: Opened) -> None:
    desk.tab.select_option("#filter", "bee")
    assert desk.tab.locator("li[data-index]:visible").evaluate_all("all => all.map((one) => one.dataset.index)") == [
        "1",
        "4",
        "7",
    ]
    assert desk.tab.locator("#shown").inner_text() == "3 of 8 images"
    desk.tab.keyboard.press("ArrowRight")
    desk.tab.keyboard.press("d")
    assert (desk.decided(1), desk.focused()) == ("drop", "4")
    desk.tab.select_option("#filter", "")
    assert desk.tab.locator("li[data-index]:visible").count() == 8


def test_tables_sort_numbers_as_numbers(desk: Opened) -> None:
    cells = desk.tab.locator("tbody td:first-child")
    desk.tab.get_by_role("button", name="examples").click()
    assert cells.all_inner_texts() == ["cat", "ant", "bee"]
    desk.tab.get_by_role("button", name="examples").click()
    assert cells.all_inner_texts() == ["bee", "ant", "cat"]
    desk.tab.get_by_role("button", name="label").click()
    assert cells.all_inner_texts() == ["ant", "bee", "cat"]
    assert desk.tab.locator("th").first.get_attribute("aria-sort") == "ascending"


def test_names_of_a_hostile_data_set_stay_text(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    write_page(desk_page(HOSTILE, "hostile", len(HOSTILE)), path)
    opened = visit(path)
    for index in range(len(HOSTILE) - 1):
        opened.card(index).locator('button[data-do="relabel"]').click()
    opened.card(len(HOSTILE) - 1).get_by_text("Drop").click()
    assert opened.tab.title() == "desk"
    assert opened.tab.locator("img[src='x']").count() == 0
    text = opened.export()
    found = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(text)[1:]]
    assert [row["index"] for row in found] == [str(index) for index in range(len(HOSTILE))]
    # A spreadsheet sees no formula, and what is read back is the name itself.
    assert not any(re.match(r"[=+\-@\t\r]", value) for row in found for value in row.values())
    guarded = [f"'{name}" if re.match(r"'*=", name) else name for name in HOSTILE]
    assert [row["label"] for row in found] == guarded
    opened.tab.evaluate("localStorage.clear()")
    opened.tab.reload()
    assert opened.load(text, tmp_path) == f"{len(HOSTILE)} decisions imported, {len(HOSTILE)} of them on this page."
    assert opened.export() == text


def test_without_storage_it_works_and_says_so(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "desk.html"
    write_page(desk_page(), path)
    context = browser.new_context(offline=True)
    context.add_init_script("Storage.prototype.setItem = () => { throw new Error('full'); };")
    tab = context.new_page()
    tab.goto(path.as_uri())
    opened = Opened(tab, [])
    opened.card(0).get_by_text("Keep").click()
    assert opened.decided(0) == "keep"
    assert "0,/data/ant/0.png,ant,keep," in opened.export()
    warning = tab.locator("#unkept")
    assert warning.is_visible()
    assert warning.inner_text() == "This browser does not keep your decisions: export them before you close the page."
    context.close()


def pixels(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("L"))


def test_mislabels_gallery_shows_the_right_images(
    stored: Path, influence: Command, visit: Visit, tmp_path: Path
) -> None:
    report, rows = tmp_path / "labels.html", tmp_path / "rows.csv"
    influence("mislabels", "--top", 12, "--report", report, "-o", rows, cwd=stored)
    opened = visit(report)
    found = list(csv.DictReader(rows.read_text().splitlines()))
    gallery = opened.tab.locator("section.part").first.locator("li[data-index]")
    assert gallery.evaluate_all("all => all.map((one) => one.dataset.index)") == [row["index"] for row in found]
    for place, row in enumerate(found):
        card = gallery.nth(place)
        shown = pixels(card.locator(".frame img").get_attribute("src"))
        assert np.array_equal(shown, np.asarray(Image.open(row["path"]).convert("L")))
        assert row["label"] in card.inner_text()
        assert card.locator(".beside li").count() == 5
    # Beside the first one: the examples that --explain calls its neighbours, with their labels.
    explained = influence("mislabels", "--explain", found[0]["index"], "--format", "csv", cwd=stored).out
    nearest = [row for row in csv.DictReader(explained.splitlines()) if row["kind"] == "neighbour"][:5]
    beside = gallery.first.locator(".beside li")
    assert beside.locator("span").all_inner_texts() == [row["label"] for row in nearest]
    for place, row in enumerate(nearest):
        shown = pixels(beside.nth(place).locator("img").get_attribute("src"))
        assert np.array_equal(shown, np.asarray(Image.open(row["path"]).convert("L")))
    assert opened.tab.locator(".scroll h2").first.inner_text() == "Classes"


@pytest.mark.slow
def test_rank_gallery_shows_the_right_images(stored: Path, influence: Command, visit: Visit, tmp_path: Path) -> None:
    report, rows, every = tmp_path / "why.html", tmp_path / "rows.csv", tmp_path / "all.csv"
    influence("rank", 3, "--top", 4, "--report", report, "-o", rows, cwd=stored)
    influence("rank", 3, "--all", "-o", every, cwd=stored)
    opened = visit(report)
    found = list(csv.DictReader(rows.read_text().splitlines()))
    assert [row["effect"] for row in found] == ["helpful"] * 4 + ["harmful"] * 4
    found = [*found[4:], *found[:4]]  # the page shows the harmful ones first
    cards = opened.tab.locator(".cards > li")
    for place, row in enumerate(found):
        shown = pixels(cards.nth(place).locator(".frame img").get_attribute("src"))
        assert np.array_equal(shown, np.asarray(Image.open(row["path"]).convert("L")))
        text = cards.nth(place).inner_text()
        assert all(word in text for word in (row["effect"], row["label"], row["predicted"], row["index"]))
    lead = opened.tab.locator(".lead")
    test = Path(found[0]["test_path"])
    assert np.array_equal(pixels(lead.locator("img").get_attribute("src")), np.asarray(Image.open(test).convert("L")))
    assert all(word in lead.inner_text() for word in (found[0]["test_label"], found[0]["test_predicted"], "loss"))
    # The bars are the sums over all training examples, not only over those shown.
    sums: dict[str, float] = {}
    for row in csv.DictReader(every.read_text().splitlines()):
        if float(row["influence"]) > 0:
            sums[row["label"]] = sums.get(row["label"], 0.0) + float(row["influence"])
    largest = max(sums, key=lambda name: sums[name])
    bars = opened.tab.locator(".bars svg").get_attribute("aria-label") or ""
    assert f"{largest} " in bars
    assert f"{sums[largest]:+.2g}" in bars


@pytest.mark.slow
def test_two_hundred_images_stay_under_five_megabytes(
    stored: Path, influence: Command, visit: Visit, tmp_path: Path
) -> None:
    report = tmp_path / "labels.html"
    influence("mislabels", "--top", 200, "--report", report, "-q", "--format", "csv", cwd=stored)
    assert report.stat().st_size <= 5_000_000
    opened = visit(report)
    gallery = opened.tab.locator("section.part").first
    assert gallery.locator("li[data-index]").count() == 200
    assert gallery.locator(".frame img").count() == 200


@pytest.mark.slow
def test_with_the_truth_the_recovery_stands_below_the_histogram(
    stored: Path, influence: Command, visit: Visit, tmp_path: Path
) -> None:
    truth, report = tmp_path / "truth.csv", tmp_path / "labels.html"
    truth.write_text("index\n" + "\n".join(map(str, range(0, 320, 16))) + "\n")
    influence("mislabels", "--truth", truth, "--report", report, "-o", tmp_path / "rows.csv", cwd=stored)
    charts = visit(report).tab.locator("section.chart")
    assert charts.locator("h2").all_inner_texts() == ["Scores by label", "Wrong labels found"]
    legend = [name.strip() for name in charts.last.locator(".legend li").all_inner_texts()]
    assert legend[:2] == ["combined", "loss"]
    assert legend[-1] == "random"
    assert charts.last.locator("polyline[points^='0.0,200.0']").count() == len(legend)


def test_scatters_stand_side_by_side_or_below_each_other_and_fit(visit: Visit, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y, same = random.uniform(10, 90, 900), 1e-5 * random.normal(size=900) ** 3, random.random(900) < 0.5
    name = "a_class_with_a_name_that_is_longer_than_a_narrow_window_is_wide_" * 2
    drawn = scatter(
        f"A: {name}.csv", "In words.", ("distance", "influence"), x, y, [(name, same), ("others", ~same)], (10, 90)
    )
    section = Section("By distance", None, (), scatters=(drawn, drawn))
    path = tmp_path / "s.html"
    write_page(Page("S", "S", ("M",), None, (section,), None, (), (), (), "influence compare", ""), path)
    opened = visit(path)
    for width, side_by_side in ((1000, True), (360, False)):
        opened.tab.set_viewport_size({"width": width, "height": 900})
        a, b = (opened.tab.locator(".scatter").nth(number).bounding_box() for number in (0, 1))
        assert a is not None
        assert b is not None
        assert (a["y"] == b["y"]) == side_by_side
        assert opened.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # Every mark, and every number and title of the axes, within the window.
        edges = opened.tab.locator(".scatter svg text, .scatter svg path").evaluate_all(
            "all => all.map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right])"
        )
        assert min(left for left, _ in edges) >= 0
        assert max(right for _, right in edges) <= width
