"""Cards for a notebook: what a data set or a file name holds cannot become markup."""

from __future__ import annotations

from influence_cli.notebook.cards import gallery
from influence_cli.report.html import Card, CardRow, Section


def test_markup_in_names_is_text() -> None:
    bad = '<script>alert("1")</script>'
    card = Card(None, bad, bad, (("label", bad), ("path", "a\u202eb")), "suspect")
    pictured = Card("data:image/png;base64,AAAA", f'"{bad}', "", (), "plain")
    html = gallery(bad, (bad,), [Section(bad, pictured, (CardRow(bad, "", (card,)), CardRow("empty", "", ())))])
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 7
    assert "no picture" in html
    assert "empty" not in html
    assert "\u202e" not in html
    assert 'alt="&quot;&lt;script' in html
