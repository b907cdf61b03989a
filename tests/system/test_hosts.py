"""Two hosts: processes in network namespaces of their own, which see each other through one cable and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.conftest import Command
from tests.support import fork_server, small_project

FIRST, SECOND, PORT = "10.77.13.1", "10.77.13.2", 29417


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `ip`, and give how it ended."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Make two network namespaces with a cable between them, or skip with a reason."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2)")
    names = tuple(f"influence-{os.getpid()}-{number}" for number in (1, 2))
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ends = [f"inf{os.getpid() % 10**6}{letter}" for letter in "ab"]
        joined = ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        if joined.returncode:
            pytest.skip(f"a cable between namespaces cannot be made here: {joined.stderr.strip()}")
        for name, end, address in zip(names, ends, (FIRST, SECOND), strict=True):
            ip("link", "set", end, "netns", name)
            for words in (
                ("link", "set", end, "name", "cable"),
                ("addr", "add", f"{address}/24", "dev", "cable"),
                ("link", "set", "cable", "up"),
                ("link", "set", "lo", "up"),
            ):
                done = ip("-n", name, *words)
                assert done.returncode == 0, done.stderr
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def project(influence: Command, tmp_path: Path) -> Path:
    """A small project, and the store that one process makes of it."""
    folder = small_project.make(tmp_path / "p")
    influence("gradients", "-s", "gradients.store=one.h5", cwd=folder)
    return folder


def check(project: Path, running: Sequence[subprocess.Popen[str]]) -> None:
    """Check that the processes of the job have made the same store, and that one of them has said so."""
    ended = [one.communicate(timeout=240) for one in running]
    assert [one.returncode for one in running] == [0, 0], ended
    spoke = [err for _, err in ended if "wrote 3 of 3 blocks of influence.h5" in err]
    assert len(spoke) == 1  # rank 0, on whichever host it is
    assert "on 2 processes" in spoke[0]
    with h5py.File(project / "one.h5") as one, h5py.File(project / "influence.h5") as two:
        assert np.allclose(one["coordinates"][: small_project.N], two["coordinates"][:], rtol=0, atol=1e-5)
        assert two["flags"][:].all()


STREAMS: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_two_hosts_run_one_job(hosts: tuple[str, str], project: Path) -> None:
    """With the variables that torchrun sets, whose own meeting is in the test below."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "MASTER_ADDR": FIRST, "MASTER_PORT": str(PORT)}
    environment |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    words = [sys.executable, "-m", "influence_cli", "gradients"]
    running = [
        fork_server.Popen(words, cwd=project, env=environment | {"RANK": str(rank)}, hook=("be_on", name), **STREAMS)
        for rank, name in enumerate(hosts)
    ]
    check(project, running)


@pytest.mark.slow  # torchrun on each host: four processes that load torch
def test_torchrun_on_two_hosts_runs_one_job(hosts: tuple[str, str], project: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    words = (
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-id", "influence", "--rdzv-endpoint", f"{FIRST}:{PORT}", "-m", "influence_cli", "gradients"),
    )
    running = []
    for name, address in zip(hosts, (FIRST, SECOND), strict=True):
        own = ("--local-addr", address, "--rdzv-conf", f"is_host={int(address == FIRST)}")
        command = ["ip", "netns", "exec", name, sys.executable, *words[:2], *own, *words[2:]]
        running.append(subprocess.Popen(command, cwd=project, env=environment, **STREAMS))
    check(project, running)
