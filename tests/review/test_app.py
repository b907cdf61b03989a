"""What the server answers, asked over a real connection: only its own address, only images by number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.desk_project import Client, decided, desk, make_desk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_desk(tmp_path, ("ant", "bee", "cat"), ("a.png", "b.png", "c.png"))


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    with desk(folder) as client:
        yield client


def test_the_page_has_the_suspects_in_order_and_no_cards(client: Client) -> None:
    status, page, headers = client.ask("")
    assert status == 200
    assert b'id="gallery"' in page
    assert b"data-index=" not in page.split(b"<script")[0]
    data = json.loads(page.split(b'id="desk">')[1].split(b"</script>")[0])
    assert [example["index"] for example in data["examples"]] == list(reversed(range(9)))
    assert data["served"] == "decisions.csv"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"


def test_cards_have_a_picture_and_their_neighbours(client: Client) -> None:
    status, cards, _ = client.ask("cards?at=0,8")
    assert status == 200
    assert cards.count(b"data-index=") == 2
    assert b'src="thumbnail/8"' in cards
    assert b'src="thumbnail/1"' in cards  # a neighbour of 8 and of 0
    assert client.ask("cards?at=9")[0] == 404
    assert client.ask("cards?at=" + ",".join("0" * 201))[0] == 404
    assert client.ask("cards?at=x")[1] == b""


@pytest.mark.parametrize("kind", ["thumbnail", "photo"])
def test_pictures_come_by_number_alone(client: Client, kind: str) -> None:
    status, data, headers = client.ask(f"{kind}/0")
    assert (status, headers["content-type"]) == (200, "image/png")
    assert data.startswith(b"\x89PNG")
    for name in (
        "9",
        "-1",
        "x",
        "..%2f..%2finfluence.yaml",
        "../../influence.yaml",
        "0/../../x",
        "",
        "99999999999999999999999",
    ):
        status, data, _ = client.ask(f"{kind}/{name}")
        assert status == 404, name
        assert b"checkpoint" not in data


def test_an_image_that_vanishes_while_reviewing_can_still_be_decided_on(client: Client, folder: Path) -> None:
    os.unlink(folder / "data" / "train" / "ant" / "a.png")  # noqa: PTH108
    assert client.ask("thumbnail/0")[0] == 404
    assert client.decide((0, "drop", "", "", ""))[0] == 200
    assert client.ask("thumbnail/1")[0] == 200


def test_other_hosts_other_pages_and_no_token_are_refused(client: Client, folder: Path) -> None:
    assert client.ask("", Host=f"evil.example:{client.port}")[0] == 403
    assert client.ask("", Host=f"127.0.0.1:{client.port + 1}")[0] == 403
    assert client.ask("", Host=f"localhost:{client.port}")[0] == 200
    assert client.ask("", Origin="http://evil.example")[0] == 403
    for path in ("/", "/cards?at=0", "/photo/0", "/wrong/photo/0", client.base[:-2] + "/", client.base[:-1]):
        assert client.ask(path, whole=True)[0] == 403, path
    body = [[0, "keep", "", "", ""]]
    assert client.ask("decisions", method="POST", body=body, Origin="http://evil.example")[0] == 403
    assert client.ask("/decisions", method="POST", body=body, whole=True)[0] == 403
    assert not (folder / "decisions.csv").exists()


def test_decisions_are_answered_when_they_are_on_disk(client: Client, folder: Path) -> None:
    assert json.loads(client.ask("decisions")[1]) == {"version": 0, "writes": True, "rows": []}
    status, answer = client.decide((8, "relabel", "ant", "", ""), (0, "keep", "", "", ""))
    assert (status, answer) == (200, {"version": 1})
    assert [(row["index"], row["decision"], row["new_label"]) for row in decided(folder)] == [
        ("0", "keep", ""),
        ("8", "relabel", "ant"),
    ]
    assert json.loads(client.ask("decisions?since=1")[1]) == {"version": 1}
    state = json.loads(client.ask("decisions?since=0")[1])
    assert sorted(row[:3] for row in state["rows"]) == [[0, "keep", ""], [8, "relabel", "ant"]]


def test_a_second_tab_that_is_late_learns_what_was_decided(client: Client, folder: Path) -> None:
    client.decide((0, "keep", "", "", ""))
    status, state = client.decide((0, "drop", "", "", ""))
    assert status == 409
    assert [row[:2] for row in state["rows"]] == [[0, "keep"]]  # type: ignore[attr-defined]
    assert decided(folder)[0]["decision"] == "keep"
    assert client.decide((0, "drop", "", "keep", ""))[0] == 200


@pytest.mark.parametrize(
    "body",
    [b"{", b"[" * 100_000, b"[]", b"\xff", b'{"a": 1}', b'[[0, "keep"]]', b'[["0", "keep", "", "", ""]]',
     b'[[true, "", "", "", ""]]', b'[[0, "keep", "", "", ""], [0, "drop", "", "", ""]]'],
)  # fmt: skip
def test_what_is_not_a_list_of_changes_is_refused(client: Client, body: bytes, folder: Path) -> None:
    assert client.ask("decisions", method="POST", body=body)[0] == 400
    assert not (folder / "decisions.csv").exists()


def test_a_form_of_another_page_is_refused_by_its_type(client: Client) -> None:
    body = b'[[0, "keep", "", "", ""]]'
    assert client.ask("decisions", method="POST", body=body, content_type="text/plain")[0] == 400


def test_a_decision_that_relabel_would_refuse_is_refused_with_the_reason(client: Client) -> None:
    status, answer = client.decide((0, "relabel", "dog", "", ""))
    assert status == 422
    assert "dog" in str(answer["error"])


def test_a_full_disk_is_said_and_nothing_is_lost(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client.decide((0, "keep", "", "", ""))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("influence_cli.runtime.disk.append", full)
        status, answer = client.decide((1, "keep", "", "", ""))
    assert (status, str(answer["error"]).endswith("No space left on device")) == (422, True)
    assert [row["index"] for row in decided(folder)] == ["0"]
    assert client.decide((1, "keep", "", "", ""))[0] == 200


def test_names_that_are_no_text_are_served_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    names = ("a.png", os.fsdecode(b"\xff.png"))
    make_desk(folder, ("ant", "bee"), names)
    with desk(folder) as client:
        assert client.ask("cards?at=0,1,2,3")[0] == 200
        assert client.decide((1, "keep", "", "", ""))[0] == 200
    assert b"\xff.png" in (folder / "decisions.csv").read_bytes()
