"""The served desk in a real headless Chromium: cards as they are scrolled to, keys, filters, two tabs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.desk_project import Client, decided, desk, make_desk

COUNT = 300


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("desk")
    make_desk(folder, ("ant", "bat", "bee"), tuple(f"{number:03}.png" for number in range(COUNT // 3)))
    with desk(folder) as client:
        yield client


@pytest.fixture
def tab(client: Client, browser: Browser) -> Iterator[Page]:
    page, problems = browser.new_page(viewport={"width": 1300, "height": 900}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(client.address)
    page.locator("li[data-index] img").first.wait_for()
    yield page
    assert problems == []
    page.close()


def test_the_desk_at_work(client: Client, tab: Page, browser: Browser) -> None:
    folder = client.ledger.path.parent
    cards = tab.locator("li[data-index]")
    assert cards.count() < COUNT
    assert tab.evaluate("document.querySelector('.frame img').getBoundingClientRect().top") < 400
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1300
    # The first key decides too; c completes to a class and moves on.
    tab.keyboard.press("k")
    tab.keyboard.press("r")
    tab.keyboard.press("c")
    tab.keyboard.type("b")
    tab.keyboard.press("Enter")
    expect(tab.locator("#status")).to_have_text('2 classes begin with "b": bat, bee.')
    tab.keyboard.type("A")
    tab.keyboard.press("Enter")
    expect(tab.locator("#decided")).to_have_text("3 of 300 decided: 1 keep, 2 relabel")
    # A second tab sees them, and the first learns what the second decides.
    other = browser.new_page()
    other.goto(client.address)
    expect(other.locator("#decided")).to_have_text("3 of 300 decided: 1 keep, 2 relabel")
    other.keyboard.press("n")
    other.keyboard.press("d")
    expect(tab.locator("#decided")).to_have_text("4 of 300 decided: 1 keep, 2 relabel, 1 drop", timeout=20_000)
    other.close()
    assert [row["decision"] for row in decided(folder)] == ["drop", "relabel", "relabel", "keep"]
    tab.keyboard.press("z")
    expect(tab.locator("#decided")).to_have_text("3 of 300 decided: 1 keep, 1 relabel, 1 drop")
    # A pair of classes, all of it selected and accepted: what was decided stays.
    tab.locator("#pair").select_option("bee → ant")
    expect(tab.locator("#shown")).to_have_text("100 of 300 images")
    tab.locator("#all").click()
    tab.locator("#accept").click()
    expect(tab.locator("#decided")).to_have_text("100 of 300 decided: 1 keep, 98 relabel, 1 drop")
    tab.locator("#pair").select_option("")
    tab.locator("#open").check()
    expect(tab.locator("#shown")).to_have_text("200 of 300 images")
    # The last one is reached by scrolling, and opens at full size.
    tab.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    last = tab.locator('li[data-index="0"]')
    last.locator("img").first.wait_for(state="attached")
    last.locator(".frame").click()
    expect(tab.locator("#photo img")).to_have_attribute("src", "photo/0")
    tab.keyboard.press("Escape")
    tab.keyboard.press("?")
    expect(tab.locator("#keys")).to_be_visible()
    assert len(decided(folder)) == 100
