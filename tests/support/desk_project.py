"""A folder of images with a result of `mislabels` about them, and a desk that is served from it."""

from __future__ import annotations

import csv
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from influence_cli.config.load import load_config
from influence_cli.relabel.labels import labelled_split
from influence_cli.review.app import Served
from influence_cli.review.desk_page import desk_page
from influence_cli.review.ledger import Ledger, open_ledger
from influence_cli.review.photos import Photos
from influence_cli.review.serve import listen, make_server
from influence_cli.review.suspects import read_suspects
from tests.support.relabel_project import CLASSES, NAMES, listing, make

COLUMNS = ("rank", "index", "path", "label", "suggested", "confidence", "score", "loss", "self_influence")


def make_desk(folder: Path, classes: tuple[str, ...] = CLASSES, names: tuple[str, ...] = NAMES) -> Path:
    """Write a project without a model, and suspects.csv: the last example is the most suspicious one."""
    make(folder, classes, names)
    write_result(folder / "suspects.csv", listing(folder), classes)
    return folder


def write_result(path: Path, known: list[tuple[str, str]], classes: tuple[str, ...]) -> None:
    """Write what `mislabels --all -o` would: the next class is suggested, the next two examples are alike."""
    from influence_cli.report.writer import write_rows

    rows = [
        {
            "rank": rank,
            "index": index,
            "path": known[index][0],
            "label": known[index][1],
            "suggested": classes[(classes.index(known[index][1]) + 1) % len(classes)],
            "confidence": 0.9,
            "score": 0.8,
            "loss": 2.5,
            "self_influence": None,
        }
        for rank, index in enumerate(reversed(range(len(known))), 1)
    ]
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        write_rows(rows, COLUMNS, "csv", stream)
    n = len(known)
    alike = {str(index): f"{(index + 1) % n} {(index + 2) % n}" for index in range(n)}
    run = {"command": ["influence", "mislabels"], "neighbours": alike, "rows": n}
    path.with_name(path.name + ".run.json").write_text(json.dumps(run))


def ledger_of(folder: Path, name: str = "decisions.csv") -> Ledger:
    config = load_config(folder / "influence.yaml", ())
    split, classes, _, places = labelled_split(config, "train")
    return open_ledger(folder / name, split, classes, folder, places=places)


def decided(folder: Path, name: str = "decisions.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@dataclass
class Client:
    """Asks a served desk, by its address unless told otherwise."""

    address: str
    port: int
    ledger: Ledger

    @property
    def base(self) -> str:
        return "/" + self.address.split("/", 3)[3]

    def ask(
        self, path: str, *, method: str = "GET", body: object = None, whole: bool = False, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        connection.request(method, path if whole else self.base + path, data, sent)
        answer = connection.getresponse()
        content = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        return content

    def decide(self, *changes: tuple[int, str, str, str, str]) -> tuple[int, dict[str, object]]:
        status, data, _ = self.ask("decisions", method="POST", body=[list(change) for change in changes])
        return status, json.loads(data)


@contextmanager
def desk(folder: Path) -> Iterator[Client]:
    """Serve a project's suspects.csv in a thread of this process."""
    ledger = ledger_of(folder)
    suspects = read_suspects(folder / "suspects.csv", ledger.split, ledger.classes, "train")
    page, cards = desk_page(suspects, ledger.split, ledger.classes, "key", "influence review", "decisions.csv")
    photos = Photos(ledger.split, folder / ".influence-thumbnails", "key")
    opened, port = listen(18_750)
    server, address = make_server(Served(page, cards, len(suspects), photos, ledger), port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield Client(address, port, ledger)
    finally:
        server.should_exit = True
        thread.join(20)
        opened.close()
        ledger.close()
