"""The page: escaped, balanced, offline, small enough, and readable without seeing it."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from influence_cli.errors import InfluenceError
from influence_cli.pictures import thumbnail
from influence_cli.report import html
from influence_cli.report.charts import Chart, ClassBars, Histogram
from influence_cli.report.html import (
    Card,
    CardRow,
    Desk,
    Neighbour,
    Page,
    PageTable,
    Review,
    Section,
    render_page,
    write_page,
)
from tests.conftest import Command

EVIL = "<script>alert(1)</script>\"'&\x1b[2J\udcff\n"
VOID = {"meta", "img", "link", "br", "wbr", "input", "hr"}


class Parsed(HTMLParser):
    """Tags with attributes and text; fails on a tag that does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(width: int = 28, height: int = 28, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def decoded(uri: str) -> Image.Image:
    kind, data = uri.split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    assert kind == f"data:image/{str(image.format).lower()}"
    return image


def card(number: int = 0, tone: html.Tone = "helpful", group: str = "ants", image: str | None = "") -> Card:
    uri = thumbnail(picture()) if image == "" else image
    return Card(
        uri, f"training example {number}", group, (("index", str(number)), ("path", f"a/{number}.png")), tone, group
    )


def page(**changes: object) -> Page:
    fields: dict[str, object] = {
        "title": "influence rank",
        "sentence": "SENTENCE",
        "meaning": ("MEANING",),
        "classes": PageTable("CLASSES", ("class", "n"), (("ants", "1,234"), ("bees", "–")), "of these"),
        "sections": (
            Section(
                "SECTION",
                card(9, "plain"),
                (
                    CardRow("Most helpful", "HINT", (card(1), card(2, "helpful", "bees"))),
                    CardRow("Most harmful", "", (card(3, "harmful"), card(4, "suspect", image=None))),
                ),
            ),
        ),
        "histogram": Histogram("HISTOGRAM", "score", 0.0, 1.0, (("ants", (3, 0, 1), 0.1),)),
        "charts": (Chart("CHART", "checked", "found", (("one", ((0.0, 0.0), (1.0, 1.0))),)),),
        "tables": (PageTable("TABLE", ("signal", "AP"), (("loss", "0.5"),)),),
        "notes": ("NOTES",),
        "command": "COMMAND",
        "config": "CONFIG:\n  a: 1\n",
    }
    return Page(**(fields | changes))  # type: ignore[arg-type]


def test_reading_order_and_balance() -> None:
    parsed = Parsed(render_page(page()))
    words = "SENTENCE MEANING CLASSES SECTION HISTOGRAM CHART TABLE NOTES COMMAND CONFIG"
    places = [parsed.text.index(word) for word in words.split()]
    assert places == sorted(places)
    assert len(parsed.all("h1")) == 1
    assert "CONFIG:\n  a: 1\n" in parsed.text


@pytest.mark.parametrize("empty", ["meaning", "tables", "sections", "notes", "charts"])
def test_parts_may_be_empty(empty: str) -> None:
    Parsed(render_page(page(**{empty: ()})))


@pytest.mark.parametrize("missing", ["classes", "histogram", "desk"])
def test_parts_may_be_missing(missing: str) -> None:
    Parsed(render_page(page(**{missing: None})))


def test_a_row_without_cards_says_so() -> None:
    text = Parsed(render_page(page(sections=(Section("S", None, (CardRow("Most harmful", "", ()),)),)))).text
    assert "None." in text


def test_data_is_escaped_everywhere() -> None:
    beside = (Neighbour(None, EVIL, EVIL, False),)
    evil = Card(None, EVIL, EVIL, ((EVIL, EVIL), ("path", EVIL)), "harmful", EVIL, beside, Review(1, EVIL, EVIL, "x"))
    table = PageTable(EVIL, (EVIL,), ((EVIL,),), EVIL)
    hostile = Page(
        title=EVIL,
        sentence=EVIL,
        meaning=(EVIL,),
        classes=table,
        sections=(Section(EVIL, evil, (CardRow(EVIL, EVIL, (evil, card())),), ClassBars(EVIL, EVIL, ((EVIL, -1, 1),))),)
        * 3,
        histogram=Histogram(EVIL, EVIL, 0.0, 1.0, ((EVIL, (1,), 0.5),)),
        charts=(Chart(EVIL, EVIL, EVIL, ((EVIL, ((0.0, 0.0),)),)),),
        tables=(table,),
        notes=(EVIL,),
        command=EVIL,
        config=EVIL,
        desk=Desk(EVIL, EVIL, 2, (EVIL, "x")),
    )
    text = render_page(hostile)
    text.encode("utf-8")
    parsed = Parsed(text)
    assert [tag.get("type") for tag in parsed.all("script")] == ["application/json", None]
    assert "<script>alert" not in text
    assert "<script>alert(1)</script>" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert r"\x1b[2J\xff" in parsed.text
    assert {name for _, attributes in parsed.tags for name in attributes if name.startswith("on")} == set()


def test_offline() -> None:
    text = render_page(page())
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\(", re.sub(r"data:image/[^\"]*", "", text))
    parsed = Parsed(text)
    assert parsed.all("link") == []
    assert all("src" not in attributes for attributes in parsed.all("script"))
    assert all((attributes["src"] or "").startswith("data:image/") for attributes in parsed.all("img"))
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in parsed.all("meta"))


def test_readable_without_seeing() -> None:
    parsed = Parsed(render_page(page()))
    assert all(attributes.get("alt") for attributes in parsed.all("img"))
    assert [a["aria-label"] for a in parsed.all("span") if a.get("role") == "img"] == ["training example 4"]
    assert parsed.all("html")[0]["lang"] == "en"
    assert len(parsed.all("caption")) == len(parsed.all("table")) == 2
    assert all(attributes["scope"] == "col" for attributes in parsed.all("th"))
    assert len(parsed.all("button")) == len(parsed.all("th"))
    ids = [str(attributes["id"]) for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [str(attributes["href"])[1:] for attributes in parsed.all("a")]
    targets += [str(attributes["for"]) for attributes in parsed.all("label")]
    targets += [str(attributes["aria-labelledby"]) for _, attributes in parsed.tags if "aria-labelledby" in attributes]
    assert set(targets) <= set(ids)
    assert "gallery" in targets


def test_tone_is_said_by_sign_and_word() -> None:
    text = " ".join(Parsed(render_page(page())).text.split())
    for said in ("+ helpful", "− harmful", "? suspect"):
        assert said in text


def test_filter_lists_the_groups() -> None:
    parsed = Parsed(render_page(page()))
    assert [option["value"] for option in parsed.all("option")] == ["", "ants", "bees"]
    groups = [attributes["data-group"] for attributes in parsed.all("li") if "data-group" in attributes]
    assert groups == ["ants", "bees", "ants", "ants"]
    one = page(sections=(Section("S", None, (CardRow("", "", (card(),)),)),))
    assert Parsed(render_page(one)).all("select") == []


def test_contents_where_there_are_many_sections() -> None:
    section = Section("S", None, ())
    assert Parsed(render_page(page(sections=(section, section)))).all("nav") == []
    assert len(Parsed(render_page(page(sections=(section,) * 4))).all("nav")) == 1


def test_numeric_columns() -> None:
    rows = (("1", "a", "–", "12%", "-1.5e-3", ""), ("1,234", "2", "3.5", "0.1 %", "−2", ""))
    assert PageTable("", tuple("abcdef"), rows).numeric == (True, False, True, True, True, False)
    assert PageTable("", ("a",), ()).numeric == (False,)


# thumbnails


def test_photo_is_shrunk_and_keeps_its_shape() -> None:
    image = decoded(thumbnail(picture(400, 200)))
    assert (image.format, image.size) == ("JPEG", (96, 48))
    assert decoded(thumbnail(picture(3000, 2))).size == (96, 1)
    assert max(decoded(thumbnail(picture(400, 200), 160)).size) == 160


def test_small_image_stays_as_it_is() -> None:
    image = decoded(thumbnail(picture(28, 14)))
    assert (image.format, image.size) == ("PNG", (28, 14))
    assert np.array_equal(np.asarray(image), np.asarray(picture(28, 14)))
    assert decoded(thumbnail(picture(96, 96))).size == (96, 96)
    assert decoded(thumbnail(picture(1, 1))).size == (1, 1)


@pytest.mark.parametrize("size", [(20, 20), (200, 100)])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode(mode: str, size: tuple[int, int]) -> None:
    source = picture(*size, mode="RGBA").convert(mode) if mode == "RGBa" else picture(*size)
    if mode == "La":
        source = source.convert("LA")
    if mode == "PA":
        source = source.convert("P")
    image = decoded(thumbnail(source.convert(mode)))
    assert image.mode in ("L", "RGB")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_images_are_stretched(dtype: type) -> None:
    ramp = np.linspace(100, 4000, 96 * 96).reshape(96, 96).astype(dtype)
    values = np.asarray(decoded(thumbnail(Image.fromarray(ramp))))
    assert (values.min(), values.max()) == (0, 255)
    flat = Image.fromarray(np.full((8, 8), 7, dtype=dtype))
    assert decoded(thumbnail(flat)).size == (8, 8)


def test_values_that_are_not_finite() -> None:
    values = np.array([[np.nan, np.inf], [0.0, 1.0]], dtype=np.float32)
    assert decoded(thumbnail(Image.fromarray(values))).getextrema() == (0, 255)
    assert decoded(thumbnail(Image.fromarray(np.full((2, 2), np.nan, np.float32)))).getextrema() == (0, 0)


def test_palette_with_transparent_bytes_does_not_warn() -> None:
    image = picture(10, 10, "P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thumbnail(image)


@pytest.mark.parametrize("size", [20, 200])
def test_the_image_is_untouched_and_its_profile_stays_home(size: int) -> None:
    image = picture(size, size)
    image.info["icc_profile"] = b"p" * 100_000
    before = image.tobytes()
    assert len(thumbnail(image)) < 50_000
    assert image.tobytes() == before
    assert "icc_profile" in image.info


# write_page


def heavy(rows: int, cards: int, size: int) -> Page:
    image = "data:image/png;base64," + "A" * size
    row = CardRow("R", "", tuple(card(number, image=image) for number in range(cards)))
    return page(sections=(Section("S", card(99, "plain", image=image), (row,) * rows),))


def test_images_beside_count_and_go_with_their_card(tmp_path: Path) -> None:
    image = "data:image/png;base64," + "A" * 50_000
    beside = (Neighbour(image, "training example 5", "bees", False),) * 3
    cards = tuple(replace(card(number, image=image), neighbours=beside) for number in range(40))
    path = tmp_path / "why.html"
    assert write_page(page(sections=(Section("S", None, (CardRow("R", "", cards),)),)), path) <= 5_000_000
    parsed = Parsed(path.read_text(encoding="utf-8"))
    # Of 40 × 200 kB: all 40 images of the cards, and those beside the first of them.
    alts = [str(image["alt"]) for image in parsed.all("img")]
    assert len(set(alts)) == 41 - 1
    assert 55 < alts.count("training example 5") - 1 < 60
    kept = (alts.count("training example 5") - 1) // 3
    assert f"{40 - kept} examples are shown without their similar images, to keep the page under 5 MB." in parsed.text


def test_write_page(tmp_path: Path) -> None:
    path = tmp_path / "why.html"
    assert write_page(page(), path) == path.stat().st_size
    assert path.read_text(encoding="utf-8") == render_page(page())
    assert list(tmp_path.iterdir()) == [path]


def test_page_stays_under_5_mb(tmp_path: Path) -> None:
    path = tmp_path / "why.html"
    size = write_page(heavy(2, 40, 100_000), path)
    text = path.read_text(encoding="utf-8")
    assert size == path.stat().st_size <= 5_000_000
    parsed = Parsed(text)
    shown = len(parsed.all("img"))
    assert size + 100_000 > 5_000_000
    assert f"{81 - shown} examples are shown without images, to keep the page under 5 MB." in text
    # The last places go first, of both rows alike; the leading image stays.
    kept = [int(str(image["alt"]).rsplit(" ", 1)[1]) for image in parsed.all("img")]
    first = kept.count(0)
    assert kept[0] == 99
    assert first == 2
    assert max(kept[1:]) <= (shown - 1) // 2
    assert len(parsed.all("figure")) == 81


def test_one_image_is_one_image(tmp_path: Path) -> None:
    write_page(heavy(1, 50, 99_000), tmp_path / "why.html")
    assert "1 example is shown without images" in (tmp_path / "why.html").read_text(encoding="utf-8")


def test_text_alone_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_BYTES", 1000)
    with pytest.raises(InfluenceError, match="without the images"):
        write_page(page(), tmp_path / "why.html")
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InfluenceError, match="no folder"):
        write_page(page(), tmp_path / "no" / "why.html")
    with pytest.raises(InfluenceError) as caught:
        write_page(page(), tmp_path / "why.pdf")
    assert "why.html" in caught.value.hint


def test_failure_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "why.html"
    path.write_text("old")

    def fail(_self: Path, _target: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InfluenceError, match="No space left"):
        write_page(page(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_chart_has_its_curves_in_place_and_a_legend() -> None:
    chart = Chart(
        "Recovery", "checked", "found", (("one <b>", ((0.0, 0.0), (0.2, 1.0))), ("two", ((0.0, 0.5), (0.4, 0.5))))
    )
    assert chart.path(chart.curves[0][1]) == "0.0,200.0 200.0,0.0"
    parsed = Parsed(render_page(page(charts=(chart,), histogram=None)))
    lines = {line["class"]: line["points"] for line in parsed.all("polyline") if line["points"] != "0,4 28,4"}
    assert lines == {"curve-0": "0.0,200.0 200.0,0.0", "curve-1": "0.0,100.0 400.0,100.0"}
    assert "one <b>" in parsed.text
    assert "40%" in parsed.text
    images = [tag for tag in parsed.all("svg") if tag.get("role") == "img"]
    assert [tag["aria-label"] for tag in images] == ["found by checked; the table has the numbers"]


def test_a_page_of_another_name_is_refused_before_any_work(stored: Path, influence: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    for words in (("rank", 3), ("mislabels",), ("compare", "a.csv", "b.csv")):
        done = influence(*words, "--report", tmp_path / "page.pdf", "-o", rows, cwd=stored, code=2)
        assert "page.pdf: a page must be .html" in done.err
        assert len(done.err.splitlines()) == 2
        assert not rows.exists()
