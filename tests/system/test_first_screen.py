"""Pages begin with photos and a sentence, on a phone too: measured in Chromium, light and dark."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from influence_cli.pictures import thumbnail
from influence_cli.report.html import Card, CardRow, Page, PageTable, Section, write_page
from tests.conftest import Command, Opened, Visit

# (width of the window, where the first photo is at the latest)
WINDOWS = ((1300, 400), (390, 600))
LONG = "american_staffordshire-terrier_of_the_northern-hills"


def check_first_screen(opened: Opened) -> None:
    """Check where the first photo is, that nothing is wider than the window, and that text is legible in both modes."""
    for width, latest in WINDOWS:
        opened.tab.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            opened.tab.emulate_media(color_scheme=scheme)
            assert opened.tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
            first = opened.tab.locator("figure img").first.bounding_box()
            assert first is not None
            assert first["y"] <= latest, (width, first)
            # Contrast of the heading, the sentence and the marks with what is behind them, as WCAG counts it.
            assert min(opened.tab.evaluate(CONTRAST)) >= 4.5, (width, scheme)
    assert opened.tab.locator("h1").count() == 1


CONTRAST = """(() => {
  const parts = (text) => text.match(/[\\d.]+/g).slice(0, 4).map(Number);
  const light = (text) => parts(text).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor, p = parts(colour);
      if (p.length < 4 || p[3] > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("h1, h2, .sentence, .note, .mark, .tag, dt, dd, summary, .unfold")]
    .filter((one) => one.offsetParent !== null && one.textContent.trim())
    .map((one) => [light(getComputedStyle(one).color), light(behind(one))])
    .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
})()"""


def headings(opened: Opened, within: str) -> list[str]:
    found: list[str] = opened.tab.locator(f"{within} h3").evaluate_all(
        "all => all.map((one) => one.firstChild.textContent.trim()).filter(Boolean)"
    )
    return found


def test_rank_begins_with_the_test_photo_and_what_harms_it(
    stored: Path, influence: Command, visit: Visit, tmp_path: Path
) -> None:
    report, rows = tmp_path / "why.html", tmp_path / "rows.csv"
    influence("rank", 3, "--top", 4, "--report", report, "-o", rows, cwd=stored)
    row = next(csv.DictReader(rows.read_text().splitlines()))
    opened = visit(report)
    check_first_screen(opened)
    title = opened.tab.locator("h1").inner_text()
    verb = "predicted" if row["test_label"] == row["test_predicted"] else "taken for"
    assert title.startswith(f"#3: {row['test_label']}, {verb} {row['test_predicted']} (")
    assert headings(opened, "section.part") == ["Most harmful", "Most helpful", "Influence by training class"]
    assert "training images" in opened.tab.locator("header .sentence").inner_text()


def test_many_errors_begin_with_what_hurts_most_of_them(
    stored: Path, influence: Command, visit: Visit, tmp_path: Path
) -> None:
    report, rows = tmp_path / "errors.html", tmp_path / "rows.csv"
    influence("rank", "0:60", "--report", report, "-o", rows, cwd=stored)
    found = list(csv.DictReader(rows.read_text().splitlines()))
    opened = visit(report)
    check_first_screen(opened)
    # Counted again from the rows: of how many test images each is among the ten most harmful.
    hurts: dict[str, int] = {}
    for row in found:
        if row["effect"] == "harmful":
            hurts[row["index"]] = hurts.get(row["index"], 0) + 1
    expected = sorted(hurts.items(), key=lambda item: (-item[1], int(item[0])))[:20]
    cards = opened.tab.locator("#part-1 .cards > li")
    shown = [dict(line.split("\t") for line in facts) for facts in cards.evaluate_all(FACTS)]
    assert [(one["index"], int(one["hurts"].split()[0])) for one in shown] == expected
    tests = {row["test"]: (row["test_label"], row["test_predicted"]) for row in found}
    wrong = [pair for pair in tests.values() if pair[0] != pair[1]]
    table = opened.tab.locator("#part-1 tbody tr")
    counts = {
        (label, predicted): int(count)
        for label, predicted, count in table.evaluate_all("all => all.map((r) => [...r.cells].map((c) => c.innerText))")
    }
    assert counts == {pair: wrong.count(pair) for pair in wrong}
    # Ten galleries with as many labels as there are, up to ten; the others behind them.
    sections = opened.tab.locator("section.part:has(.lead)")
    labels = [text.split(": ")[1].split(",")[0] for text in sections.locator("h2").all_inner_texts()]
    assert len(labels) == 10
    assert len(set(labels)) == min(10, len({label for label, _ in tests.values()}))
    more = opened.tab.locator("details.more")
    assert more.locator("summary").inner_text() == "50 more test images"
    assert not more.locator(".cards > li").first.is_visible()
    more.locator("summary").click()
    assert more.locator(".cards > li img").count() == 50
    assert opened.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


# The names and values on each card.
FACTS = """all => all.map((li) => [...li.querySelectorAll("dl div")]
  .map((line) => [...line.children].map((cell) => cell.innerText).join("\\t")))"""


def many_classes() -> Page:
    """A page of a hundred long names."""
    names = [f"{LONG}_{number}" for number in range(100)]
    image = thumbnail(Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8)))
    cards = tuple(
        Card(image, name, name, (("predicted", name), ("index", "1")), "harmful", name, mark="label looks wrong")
        for name in names[:30]
    )
    table = PageTable("Classes", ("label", "taken for", "errors"), tuple((name, name, "1") for name in names))
    section = Section(f"#1: {names[0]}, taken for {names[1]} (82%)", cards[0], (CardRow("Most harmful", "", cards),))
    answer = section.heading
    return Page(
        "influence rank", "S", ("M",), table, (section,), None, (), (), (), "C", "", answer=answer, lead="A sentence."
    )


def test_long_names_break_where_their_words_meet_and_long_tables_fold(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    write_page(many_classes(), path)
    opened = visit(path)
    check_first_screen(opened)
    opened.tab.set_viewport_size({"width": 390, "height": 900})
    # Every line of a name ends at its end, at an underscore or at a hyphen.
    ends = opened.tab.evaluate(LINE_ENDS)
    assert len(ends) > 10
    assert set(ends) <= {"_", "-"}
    lines = opened.tab.locator("tbody tr")
    assert sum(line.is_visible() for line in lines.all()) == 20
    opened.tab.get_by_text("Show all 100 rows").click()
    assert sum(line.is_visible() for line in lines.all()) == 100
    assert opened.tab.locator(".unfold").is_hidden()


# The last character of each line but the last, of the names on the first cards.
LINE_ENDS = """(() => {
  const ends = [];
  for (const one of document.querySelectorAll("h1, .name > span:first-child, dl dd, td:not(.num)")) {
    if (one.offsetParent === null) continue;
    const range = document.createRange(), walker = document.createTreeWalker(one, NodeFilter.SHOW_TEXT);
    let before = null, bottom = null;
    while (walker.nextNode()) {
      const node = walker.currentNode;
      for (let at = 0; at < node.length; at++) {
        range.setStart(node, at);
        range.setEnd(node, at + 1);
        const box = range.getBoundingClientRect();
        if (!box.width) continue;
        if (bottom !== null && box.top >= bottom - 1 && before !== " ") ends.push(before);
        before = node.data[at];
        bottom = box.bottom;
      }
    }
  }
  return ends;
})()"""
