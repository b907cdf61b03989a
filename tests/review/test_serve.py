"""The server as a process: its port, its end, and what a kill leaves."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from influence_cli.errors import InfluenceError
from influence_cli.review.serve import HOST, listen
from tests.support.desk_project import decided, make_desk


def test_a_port_in_use_gives_the_next_free_one() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        opened, number = listen(port)
        opened.close()
    assert number > port


def test_no_port_at_all_is_an_error() -> None:
    with pytest.raises(InfluenceError, match="no port from 70000"):
        listen(70_000)


@contextmanager
def running(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start `influence review suspects.csv`; give the process, its address and what it said until then."""
    command = [sys.executable, "-m", "influence_cli", "review", "suspects.csv", *words]
    started = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stderr is not None
    said = ""
    try:
        while not (found := re.search(r"open (http://\S+)\n", said)):
            line = started.stderr.readline()
            assert line, said
            said += line
        yield started, found.group(1), said
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(120)
        started.stderr.close()


def post(address: str, index: int) -> None:
    host, _, path = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=120)
    body = json.dumps([[index, "keep", "", "", ""]])
    try:
        connection.request("POST", f"/{path}decisions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
    finally:
        connection.close()


def test_kill_in_the_midst_of_decisions_loses_none_that_was_answered(tmp_path: Path) -> None:
    folder = make_desk(tmp_path, ("ant", "bee"), tuple(f"{number:03}.png" for number in range(100)))
    kept: list[int] = []
    with running(folder) as (process, address, _):

        def decide() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                for index in range(200):
                    post(address, index)
                    kept.append(index)

        deciding = threading.Thread(target=decide)
        deciding.start()
        while len(kept) < 20:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        deciding.join(120)
    assert kept
    there = {int(row["index"]) for row in decided(folder)}
    assert set(kept) <= there
    assert len(there) <= len(kept) + 1  # the one that was on its way
    with running(folder) as (process, address, said):
        assert f"{len(there)} decided in decisions.csv" in said
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "influence review suspects.csv goes on" in rest


def test_a_second_server_takes_the_next_port_and_only_reads(tmp_path: Path) -> None:
    folder = make_desk(tmp_path, ("ant", "bee"), ("a.png", "b.png"))
    with (
        running(folder, "--port", "18900") as (_, first, _),
        running(folder, "--port", first.split(":")[2].split("/")[0]) as (
            _,
            second,
            said,
        ),
    ):
        assert "is in use: serving on" in said
        assert "this one only shows it" in said
        assert first.split("/")[2] != second.split("/")[2]
        with pytest.raises(AssertionError, match="only reads"):
            post(second, 0)
        post(first, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.csv",), "nothing.csv: there is no such file"),
        (("suspects.csv", "--on", "both"), "--on both: there is no such set"),
        (("suspects.csv", "--decisions", "d.txt"), "d.txt: decisions must be a .csv file"),
        (("suspects.csv", "--decisions", "no/d.csv"), "no/d.csv cannot be written"),
    ],
)
def test_mistakes_end_before_anything_is_served(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    folder = make_desk(tmp_path, ("ant", "bee"), ("a.png",))
    ended = subprocess.run(
        [sys.executable, "-m", "influence_cli", "review", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 2
    assert message in ended.stderr
