"""How much memory is free, how much one example takes in the layer pass, and the batch size that follows."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from influence_cli.runtime import distributed

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)

# Of mallopt, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

Result = TypeVar("Result")


def available_bytes(device: torch.device) -> int:
    """Count the free bytes of a device; on the CPU within the machine's memory and the cgroup's limit.

    Processes of a job on one host share the CPU's.
    """
    if device.type == "cuda":
        # Memory that torch has cached for its next tensors is free as well.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    free = _machine_bytes()
    for limit_file, used_file in CGROUPS:
        limit, used = _number(Path(limit_file)), _number(Path(used_file))
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used + _cached_bytes(Path(used_file).parent)))
    return free // distributed.on_this_host()


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 10**9  # a system that does not report it


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and int(text) < 2**60 else None


def _cached_bytes(folder: Path) -> int:
    """Count file pages that the kernel can reclaim: a store in the page cache is not memory in use."""
    try:
        pairs = (line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines() if " " in line)
        counts = dict(pairs)
    except OSError:
        return 0
    # For cgroup v1, whose plain numbers leave out the groups below.
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED")
    )


def halving(work: Callable[[int], Result], batch: int, tell: Callable[[str], Any]) -> tuple[Result, int]:
    """Run ``work`` with a batch size, halving it while memory runs out.

    Returns:
        What ``work`` returned, and the batch size that worked.
    """
    while True:
        try:
            return work(batch), batch
        except (MemoryError, RuntimeError) as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        batch //= 2
        tell(f"out of memory: continuing with batches of {batch}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def reuse_freed() -> None:
    """Let glibc keep what is freed for the next allocation, up to 1 GB: else every large tensor is paid page by page.

    A training step of a small CNN takes a quarter less time so.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 28)
