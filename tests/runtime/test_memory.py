"""How much memory there is and is taken, what happens where it runs out, and that no batch leaves any behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature import ekfac
from influence_cli.curvature.blocks import keep
from influence_cli.curvature.coordinates import Blocks, coordinates
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.operator import Examples, mean_product
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, track
from influence_cli.passes import batch_size
from influence_cli.passes.batch_size import example_bytes, plan_batch
from influence_cli.passes.coverage import make_network
from influence_cli.passes.curvature_products import curvature_product
from influence_cli.passes.layers import Tape, forward
from influence_cli.runtime import memory
from influence_cli.runtime.memory import available_bytes, halving, is_out_of_memory
from influence_cli.solvers.cg import conjugate_gradients
from influence_cli.solvers.lissa import Series, lissa
from influence_cli.store.store import Store
from tests.conftest import Command

loss = partial(nn.functional.cross_entropy, reduction="none")
CPU = torch.device("cpu")
MACHINE = 10**12
# Bytes by which the process may grow with a batch. A tape of the test's model holds fifteen times as much.
SLOPE = 2048
# Bytes by which it may grow with a product of a solver, over 10,000 of them: 2 MB in all.
SOLVER_SLOPE = 200


def made(model: nn.Module, inputs: Tensor) -> Network:
    return make_network(track(model.eval(), loss, ("*",), "layers"), inputs)


def convolutional(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3), nn.Flatten(), nn.LazyLinear(5)
    )


# --- what there is


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a control group's files, v2 or v1, and let them be the only ones."""
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    monkeypatch.setattr(memory, "_machine_bytes", lambda: MACHINE)
    folders = {version: tmp_path / f"v{version}" for version in names}
    pairs = tuple(
        tuple(str(folders[version] / name) for name in own) for version, own in sorted(names.items(), reverse=True)
    )
    monkeypatch.setattr(memory, "CGROUPS", pairs)

    def write(version: int, limit: str | None, used: str | None, stat: str | None = None) -> Path:
        folder = folders[version]
        folder.mkdir(exist_ok=True)
        for name, text in zip((*names[version], "memory.stat"), (limit, used, stat), strict=True):
            if text is not None:
                (folder / name).write_text(text)
        return folder

    return write


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        ("8000\n", "3000\n", None, 5000),
        ("8000\n", "9000\n", None, 0),
        ("8000\n", "7000\n", "anon 5\ninactive_file 1500\nactive_file 400\n", 2500),
        ("8000\n", "7000\n", "inactive_file 1500\ntotal_cache 9\ntotal_inactive_file 1600\n", 2600),
        ("8000\n", "7000\n", "nothing of the kind\n", 1000),
        (f"{10**15}\n", "3000\n", None, MACHINE),
        ("max\n", "3000\n", None, MACHINE),
        ("9223372036854771712\n", "3000\n", None, MACHINE),
        ("8000\n", None, None, MACHINE),
        (None, "3000\n", None, MACHINE),
        ("\n", "3000\n", None, MACHINE),
        ("none of it\n", "3000\n", None, MACHINE),
    ],
)
def test_the_control_groups_limit_counts(
    cgroup: Callable[..., Path], version: int, limit: str | None, used: str | None, stat: str | None, expected: int
) -> None:
    cgroup(version, limit, used, stat)
    assert available_bytes(CPU) == expected


def test_without_a_control_group_the_machine_counts(cgroup: Callable[..., Path]) -> None:
    assert available_bytes(CPU) == MACHINE


def test_the_tighter_of_two_limits_counts(cgroup: Callable[..., Path]) -> None:
    cgroup(1, "8000", "3000")
    cgroup(2, "9000", "5000")
    assert available_bytes(CPU) == 4000


def test_this_machine_says_something_sensible() -> None:
    assert 2**20 < available_bytes(CPU) < 2**50


# --- what an example takes, and the batch that follows


def test_an_example_takes_more_in_a_larger_model_and_always_the_same() -> None:
    inputs = torch.randn(4, 1, 12, 12)
    narrow, wide = convolutional(4), convolutional(16)
    for model in (narrow, wide):
        model(inputs)
    networks = [made(model, inputs) for model in (narrow, wide)]
    sizes = [example_bytes(network, inputs) for network in networks]
    # The outputs of both convolutions, and the slopes in them, at least.
    for size, width in zip(sizes, (4, 16), strict=True):
        outputs = 4 * width * (10 * 10 + 8 * 8)
        assert 2 * outputs <= size <= 6 * outputs
    assert 3 * sizes[0] < sizes[1] < 5 * sizes[0]
    for network, size in zip(networks, sizes, strict=True):
        assert [example_bytes(network, inputs) for _ in range(5)] == [size] * 5
        # Of any number of examples, the share of one.
        assert example_bytes(network, inputs[:2].clone()) == pytest.approx(size, rel=0.05)
        assert all(parameter.grad is None for parameter in network.model.parameters())


def test_what_an_example_takes_is_counted_once() -> None:
    inputs = torch.randn(8, 100)
    network = made(nn.Sequential(nn.Linear(100, 500), nn.Tanh(), nn.Linear(500, 50)), inputs)
    # The input, as given and as read; what tanh gives, saved and read alike; a slope at each layer's output.
    assert example_bytes(network, inputs) == pytest.approx(4 * (2 * 100 + 500 + 500 + 50), rel=0.01)


def test_a_larger_image_takes_more() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    small, large = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 32, 32)
    network = made(model, small)
    assert example_bytes(network, large) > 10 * example_bytes(network, small)


def test_the_batch_is_what_fits_and_at_most_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(4, 1, 12, 12)
    model = convolutional(4)
    model(inputs)
    network = made(model, inputs)
    width = 100
    each = example_bytes(network, inputs) + 12 * width

    def planned(free: float, block: int = 256) -> int:
        monkeypatch.setattr(batch_size, "available_bytes", lambda _device: int(free))
        return plan_batch(network, inputs, width, block)

    assert planned(10**12) == 256
    assert planned(10**12, block=100) == 100
    assert planned(10**12, block=1) == 1
    for batch in (1, 2, 16, 64, 128):
        needed = batch * each / batch_size.SHARE
        assert planned(1.01 * needed) == batch
        assert planned(1.9 * needed) == batch
    assert planned(0) == 1
    plans = [planned(free) for free in np.logspace(3, 9, 60)]
    assert plans == sorted(plans)
    assert all(plan & (plan - 1) == 0 for plan in plans)


def test_wide_rows_and_parameters_outside_the_pass_make_the_batch_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.head = nn.Parameter(torch.zeros(6)), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x + self.shift.exp()))

    inputs = torch.randn(4, 6)
    network, covered = made(Loose(), inputs), made(nn.Sequential(nn.Tanh(), nn.Linear(6, 5)), inputs)
    assert network.rest == ("shift",)
    monkeypatch.setattr(batch_size, "available_bytes", lambda _device: 10**5)
    assert plan_batch(network, inputs, 10, 4096) < plan_batch(covered, inputs, 10, 4096)
    assert plan_batch(covered, inputs, 1000, 4096) < plan_batch(covered, inputs, 10, 4096)


# --- where it runs out

ERRORS = {
    "Python": lambda: MemoryError(),
    "the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Windows": lambda: RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to"),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuDNN": lambda: RuntimeError("CUDA error: out of memory"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_batch_is_halved_until_it_fits(kind: str) -> None:
    tried: list[int] = []
    told: list[str] = []

    def work(batch: int) -> str:
        tried.append(batch)
        if batch > 10:
            raise ERRORS[kind]()
        return f"done with {batch}"

    assert halving(work, 100, told.append) == ("done with 6", 6)
    assert tried == [100, 50, 25, 12, 6]
    assert told == [f"out of memory: continuing with batches of {batch}" for batch in tried[1:]]


def test_what_fits_is_tried_once() -> None:
    assert halving(lambda batch: batch + 1, 8, pytest.fail) == (9, 8)


@pytest.mark.parametrize("kind", ERRORS)
def test_one_example_that_does_not_fit_is_the_end(kind: str) -> None:
    tried: list[int] = []

    def work(batch: int) -> None:
        tried.append(batch)
        raise ERRORS[kind]()

    with pytest.raises(type(ERRORS[kind]())):
        halving(work, 4, lambda _: None)
    assert tried == [4, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyboardInterrupt()])
def test_another_error_passes_at_once(error: BaseException) -> None:
    tried: list[int] = []

    def work(batch: int) -> None:
        tried.append(batch)
        raise error

    with pytest.raises(type(error)):
        halving(work, 4, pytest.fail)
    assert tried == [4]
    assert not is_out_of_memory(error)


def test_real_errors_are_known() -> None:
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((MemoryError, RuntimeError)) as error:
            allocate()
        assert is_out_of_memory(error.value), str(error.value)


def test_what_a_failed_batch_held_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    class Held:
        pass

    alive: list[weakref.ref[Held]] = []

    def work(batch: int) -> int:
        assert not any(ref() is not None for ref in alive)
        held = Held()
        alive.append(weakref.ref(held))
        if batch > 1:
            raise MemoryError
        return batch

    assert halving(work, 4, lambda _: None) == (1, 1)
    assert len(alive) == 3


# --- through the command line


def rows_of(project: Path) -> np.ndarray:
    with h5py.File(project / "influence.h5") as file:
        return np.asarray(file["coordinates"])


def facts_of(project: Path) -> dict[str, object]:
    with Store.open(project / "influence.h5") as store:
        return store.facts


def limited(most: int, sizes: list[int]) -> Callable[..., object]:
    """Compute coordinates of at most so many examples; more are out of memory."""

    def compute(network: Network, basis: object, inputs: Tensor, targets: Tensor) -> object:
        sizes.append(len(inputs))
        if len(inputs) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return coordinates(network, basis, inputs, targets)  # type: ignore[arg-type]

    return compute


def test_a_first_batch_that_does_not_fit_is_halved(
    influence: Command, project: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    used: list[int] = []
    monkeypatch.setattr("influence_cli.precompute.make_store.coordinates", limited(16, tried))
    monkeypatch.setattr("influence_cli.precompute.fill_store.coordinates", limited(16, used))
    done = influence("gradients", cwd=project)
    assert tried == [64, 32, 16]
    assert used == [16] * 20
    assert "warning: out of memory: continuing with batches of 32" in done.err
    assert "warning: out of memory: continuing with batches of 16" in done.err
    assert "wrote 5 of 5 blocks" in done.err
    assert [facts_of(folder)["batch"] for folder in (project, stored)] == [16, 64]
    assert np.allclose(rows_of(project), rows_of(stored), atol=1e-6)
    # The next run takes the batch of the store.
    used.clear()
    with Store.open(project / "influence.h5", write=True) as store:
        store.clear(np.array([2]))
    influence("gradients", cwd=project)
    assert used == [16] * 4


@pytest.mark.slow
def test_a_fit_that_does_not_fit_is_halved(influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("gradients", "-s", "curvature.method=ekfac", "-s")
    influence(*words, "gradients.store=whole.h5", cwd=project)

    def small(network: Network, inputs: Tensor) -> Tape:
        if len(inputs) > 32:
            raise MemoryError
        return forward(network, inputs)

    monkeypatch.setattr(ekfac, "forward", small)
    done = influence(*words, "gradients.store=halved.h5", cwd=project)
    assert "warning: out of memory: continuing with batches of 32" in done.err
    with Store.open(project / "whole.h5") as whole, Store.open(project / "halved.h5") as halved:
        values = [store.array("factor.0000.values") for store in (whole, halved)]
    # All labels count here, none is drawn: the factors do not depend on the batches.
    assert np.allclose(values[0], values[1], rtol=1e-3, atol=1e-6 * values[0].max())


@pytest.mark.parametrize(("first", "then"), [(64, 16), (16, 64)])
@pytest.mark.slow
def test_an_interrupted_fit_may_go_on_with_less_or_more_memory(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, first: int, then: int
) -> None:
    words = ("gradients", "-s", "curvature.method=ekfac", "-s")
    influence(*words, "gradients.store=whole.h5", cwd=project)
    monkeypatch.setattr("influence_cli.precompute.fit_file.SAVE_EVERY", 0)
    calls = 0

    def stopping(network: Network, inputs: Tensor) -> Tape:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return forward(network, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ekfac, "forward", stopping)
        patch.setattr("influence_cli.precompute.make_store.plan_batch", lambda *_: first)
        influence(*words, "gradients.store=resumed.h5", cwd=project, code=130)
    assert (project / "resumed.h5.fit").exists()
    monkeypatch.setattr("influence_cli.precompute.make_store.plan_batch", lambda *_: then)
    influence(*words, "gradients.store=resumed.h5", cwd=project)
    with Store.open(project / "whole.h5") as whole, Store.open(project / "resumed.h5") as resumed:
        values = [store.array("factor.0000.values") for store in (whole, resumed)]
    assert np.allclose(values[0], values[1], rtol=1e-3, atol=1e-6 * values[0].max())


def test_a_later_block_that_does_not_fit_keeps_the_ones_before(
    influence: Command, project: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def third(network: Network, basis: object, inputs: Tensor, targets: Tensor) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return coordinates(network, basis, inputs, targets)  # type: ignore[arg-type]

    monkeypatch.setattr("influence_cli.precompute.fill_store.coordinates", third)
    done = influence("gradients", cwd=project, code=2)
    assert "out of memory in block" in done.err
    assert "with batches of 64" in done.err
    assert "gradients.block" in done.err
    assert "finished work is kept" in done.err
    path = project / "influence.h5"
    with Store.open(path) as store:
        assert store.done().tolist() == [True, True, False, False, False]
        assert store.damaged().tolist() == []
    before = rows_of(project)[:128]
    again = influence("gradients", cwd=project)
    assert "wrote 3 of 5 blocks" in again.err
    assert calls == 6
    assert np.array_equal(rows_of(project)[:128], before)
    assert np.allclose(rows_of(project), rows_of(stored), atol=1e-6)


def test_a_later_error_of_another_kind_is_not_taken_for_it(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("influence_cli.precompute.fill_store.coordinates", fail)
    done = influence("gradients", cwd=project, code=2)
    assert "shapes do not fit" in done.err
    assert "out of memory" not in done.err


# --- what is left behind


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "ford", "keep"]
    ]


def allocated_bytes() -> int:
    """Count the bytes that are allocated: what earlier tests freed and the allocator holds hides nothing of them."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):  # not glibc
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.used + info.hblkhd)


def growth(work: Callable[[], object], batches: int = 300, first: int = 100) -> float:
    """Measure by how many bytes a batch the process grows, past the first few batches.

    The least of three rounds: pages that the allocator takes once are no growth, what is kept grows in every round.
    """
    # What earlier tests have freed and the allocator still holds would hide a growth.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    for _ in range(first):
        work()
    rounds = []
    for _ in range(3):
        before, held = resident_bytes(), allocated_bytes()
        for _ in range(batches):
            work()
        rounds.append(max(resident_bytes() - before, allocated_bytes() - held) / batches)
    return min(rounds)


class Small(nn.Module):
    """A convolution, a norm, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4)
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


@pytest.fixture
def pass_of_a_basis() -> tuple[Network, Callable[[], object]]:
    torch.manual_seed(0)
    inputs, targets = torch.randn(16, 1, 9, 9), torch.randint(0, 3, (16,))
    network = made(Small(), inputs)
    batches = [Batch(inputs, targets, np.arange(16))]
    blocks = fit(network, lambda _stage, start: batches[start:], how="sampled", seed=0)
    basis = Blocks(tuple(keep(blocks, np.arange(0, 60, 2), CPU)))
    return network, lambda: coordinates(network, basis, inputs, targets)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory is resident")
def test_batches_leave_nothing_behind(pass_of_a_basis: tuple[Network, Callable[[], object]]) -> None:
    network, work = pass_of_a_basis
    hooks = [len(module._forward_hooks) for module in network.model.modules()]
    wanted = [parameter.requires_grad for parameter in network.model.parameters()]
    assert growth(work) <= SLOPE
    assert [len(module._forward_hooks) for module in network.model.modules()] == hooks == [0] * len(hooks)
    assert [parameter.requires_grad for parameter in network.model.parameters()] == wanted == [True] * len(wanted)
    assert all(parameter.grad is None for parameter in network.model.parameters())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory is resident")
def test_the_measurement_sees_tapes_that_are_kept(pass_of_a_basis: tuple[Network, Callable[[], object]]) -> None:
    network, _ = pass_of_a_basis
    inputs, tapes = torch.randn(128, 1, 9, 9), []

    def leak() -> None:
        tapes.append(forward(network, inputs))

    assert growth(leak, batches=100) > 4 * SLOPE


# --- solvers


class Kept:
    """A product that keeps the graph of the last gradient alive, as several implementations do."""

    def __init__(self, network: Network, inputs: Tensor, targets: Tensor) -> None:
        self._network, self._inputs, self._targets = network, inputs, targets
        self._slopes: list[Tensor] = []

    def __call__(self, vectors: Tensor) -> Tensor:
        wanted = list(self._network.parameters().values())
        total = self._network.loss(self._network.model(self._inputs), self._targets).sum()
        slopes = torch.autograd.grad(total, wanted, create_graph=True)
        self._slopes += slopes
        return curvature_product(self._network, self._inputs, self._targets, vectors, "ggn") + vectors


@pytest.fixture
def smallest() -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs, targets = torch.randn(4, 3), torch.randint(0, 2, (4,))
    return made(nn.Linear(3, 2), inputs), inputs, targets


def iterations_of(solver: str, product: Callable[[Tensor], Tensor], size: int, count: int) -> int:
    """Run a solver for so many products with the curvature, and count them."""
    taken = 0

    def counted(vectors: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        return product(vectors)

    v = torch.randn(1, size, generator=torch.Generator().manual_seed(1))
    while taken < count:
        if solver == "cg":
            conjugate_gradients(counted, v, tolerance=1e-4)
        else:
            lissa(counted, counted, v, series=Series(1e4, count), max_iterations=count)
    return taken


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory is resident")
@pytest.mark.parametrize(("solver", "matrix", "rounds"), [("cg", "ggn", 2), ("lissa", "hessian", 8)])
@pytest.mark.quick("cg-ggn-2")
def test_iterations_leave_nothing_behind(
    solver: str, matrix: str, rounds: int, smallest: tuple[Network, Tensor, Tensor]
) -> None:
    network, inputs, targets = smallest
    product = mean_product(network, Examples(inputs, targets, 4), matrix, 0.1)
    slope = growth(lambda: iterations_of(solver, product, network.size, 100), batches=rounds, first=2) / 100
    assert slope <= SOLVER_SLOPE
    assert all(parameter.grad is None for parameter in network.model.parameters())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory is resident")
def test_the_measurement_sees_graphs_that_are_kept(smallest: tuple[Network, Tensor, Tensor]) -> None:
    network, inputs, targets = smallest
    product = Kept(network, inputs, targets)
    slope = growth(lambda: iterations_of("cg", product, network.size, 100), batches=1, first=1) / 100
    assert slope > 10 * SOLVER_SLOPE
