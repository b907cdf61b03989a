"""Solvers against torch.linalg.solve: plain matrices, no model; then the curvature of a small network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature.explicit import curvature_matrix
from influence_cli.curvature.operator import Examples, mean_product
from influence_cli.curvature.preconditioner import heaviest_rows, row_preconditioner
from influence_cli.data.batches import Batch
from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from influence_cli.solvers.cg import SolveInfo, conjugate_gradients, few_products, orthonormal
from influence_cli.solvers.lanczos import lanczos
from influence_cli.solvers.lissa import Series, lissa
from influence_cli.solvers.nystrom import nystrom

Solve = Callable[..., tuple[Tensor, SolveInfo]]


def matrix_of(values: Tensor, seed: int) -> Tensor:
    """Make a symmetric matrix with these eigenvalues and random eigenvectors."""
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=seeded(seed)))
    return q @ torch.diag(values.double()) @ q.T


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(size: int = 60, condition: float = 300.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite matrix, right-hand sides, and the solutions."""
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    matrix = matrix_of(values, seed)
    v = torch.randn(3, size, dtype=torch.float64, generator=seeded(seed + 1))
    return matrix.float(), v.float(), torch.linalg.solve(matrix, v.T).T.float()


def distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def neumann(batch: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor], v: Tensor, **how: object) -> object:
    """Precondition a series by the matrix's own diagonal."""
    diagonal = torch.stack([product(row[None])[0] for row in torch.eye(v.shape[1], dtype=v.dtype)]).diagonal()
    return lissa(batch, product, v, precondition=lambda r: r / diagonal.abs(), **how)  # type: ignore[arg-type]


# Each takes a product and right-hand sides, and finds its own scale, rank and number of iterations.
SOLVERS: dict[str, Solve] = {
    "cg": conjugate_gradients,
    "nystrom": partial(nystrom, rank=15),
    "lissa": lambda product, v, **how: lissa(
        product, product, v, max_iterations=400_000, series=Series(steps=1000), **how
    ),
    "neumann": lambda product, v, **how: neumann(
        product, product, v, max_iterations=400_000, series=Series(steps=1000), **how
    ),
}


# --- conjugate gradients


def test_conjugate_gradients() -> None:
    matrix, v, exact = problem()
    x, info = conjugate_gradients(lambda u: u @ matrix, v)
    assert distance(x, exact) < 1e-4
    assert info.converged
    assert info.residual <= 1e-5
    assert 0 < info.iterations <= 120
    assert info.products < 3.5 * info.iterations


def test_they_say_when_they_stop_early() -> None:
    matrix, v, _ = problem(condition=1e5)
    _, info = conjugate_gradients(lambda u: u @ matrix, v, max_iterations=3)
    assert not info.converged
    assert info.iterations == 3
    assert info.residual > info.tolerance


def test_they_refuse_an_indefinite_matrix() -> None:
    with pytest.raises(InfluenceError, match=r"direction of curvature -0\.5"):
        conjugate_gradients(lambda u: u * torch.tensor([1.0, -0.5]), torch.tensor([[0.0, 1.0]]))


def test_they_take_a_zero_right_side() -> None:
    x, info = conjugate_gradients(lambda u: 2 * u, torch.zeros(2, 4))
    assert torch.equal(x, torch.zeros(2, 4))
    assert info.converged
    assert info.iterations == 0


def test_right_sides_that_depend_on_each_other_are_solved_together() -> None:
    matrix, v, exact = problem()
    more = torch.stack([v[0], 2 * v[0], v[1], v[0] - v[1], torch.zeros(60), 1e-6 * v[2]])
    wanted = torch.stack([exact[0], 2 * exact[0], exact[1], exact[0] - exact[1], torch.zeros(60), 1e-6 * exact[2]])
    x, info = conjugate_gradients(lambda u: u @ matrix, more)
    assert info.converged
    # Three directions, not six: what depends on the others costs no product.
    assert info.products < 3.5 * info.iterations
    for row, other in zip(x, wanted, strict=True):
        assert float((row - other).norm()) <= 1e-4 * float(other.norm())


def test_a_block_needs_fewer_iterations_than_its_right_sides_alone() -> None:
    matrix, _, _ = problem(size=80, condition=1e4)
    v = torch.randn(4, 80, generator=seeded(3))
    together = conjugate_gradients(lambda u: u @ matrix, v, tolerance=1e-4)[1]
    alone = [conjugate_gradients(lambda u: u @ matrix, row[None], tolerance=1e-4)[1] for row in v]
    assert together.iterations < 0.5 * max(info.iterations for info in alone)
    assert together.products < 0.7 * sum(info.products for info in alone)


def test_a_preconditioner_changes_the_count_not_the_answer() -> None:
    scales = torch.logspace(0, 4, 100, dtype=torch.float64)
    near = matrix_of(1 + torch.rand(100, generator=seeded(1)), 2)
    matrix = scales.sqrt()[:, None] * near * scales.sqrt()
    v = torch.randn(2, 100, dtype=torch.float64, generator=seeded(3))
    plain = conjugate_gradients(lambda u: u @ matrix, v, tolerance=1e-8)
    better = conjugate_gradients(lambda u: u @ matrix, v, precondition=lambda r: r / scales, tolerance=1e-8)
    assert distance(better[0], plain[0]) < 1e-6
    assert 3 * better[1].iterations < plain[1].iterations


def test_a_basis_of_rows_leaves_out_what_depends() -> None:
    rows = torch.randn(3, 20, dtype=torch.float64, generator=seeded(0))
    basis = orthonormal(torch.cat([rows, rows[:2] + rows[1:], torch.zeros(1, 20)]))
    assert basis.shape == (3, 20)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(rows @ basis.T @ basis, rows)
    assert len(orthonormal(torch.zeros(2, 5))) == 0


# --- series


def noisy(matrix: Tensor, seed: int = 1) -> Iterator[Tensor]:
    """Unbiased mini-batch matrices: A plus symmetric noise of its own size's tenth."""
    generator = seeded(seed)
    while True:
        noise = torch.randn(matrix.shape, generator=generator) * 0.01
        yield matrix + (noise + noise.T) / 2


@pytest.mark.parametrize("series", [lissa, neumann])
def test_a_series_reaches_the_size_not_only_the_order(series: Solve) -> None:
    matrix, v, exact = problem(condition=50)
    batches = noisy(matrix)
    x, info = series(lambda u: u @ next(batches), lambda u: u @ matrix, v, tolerance=1e-3)
    assert info.converged
    assert distance(x, exact) < 1e-2


def test_a_scale_that_is_too_small_is_doubled() -> None:
    matrix, v, exact = problem(condition=20)
    x, info = lissa(lambda u: u @ matrix, lambda u: u @ matrix, v, series=Series(0.2), tolerance=1e-4)
    assert info.scale is not None
    assert info.scale > 0.4
    assert distance(x, exact) < 1e-2


def test_a_series_that_stops_early_says_so() -> None:
    matrix, v, _ = problem(condition=1e4)
    _, info = lissa(lambda u: u @ matrix, lambda u: u @ matrix, v, max_iterations=150)
    assert info.iterations == 150
    assert not info.converged


def test_a_series_never_returns_garbage() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(InfluenceError, match="not positive definite"):
        lissa(lambda u: u @ matrix, lambda u: u @ matrix, torch.ones(1, 2), series=Series(2.0))


# --- all of them


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("limits", "message"), [({"tolerance": 0.0}, "tolerance of 0"), ({"tolerance": 2.0}, "2")])
def test_limits_that_solve_nothing_are_refused(name: str, limits: dict[str, float], message: str) -> None:
    matrix, v, _ = problem(size=20)
    with pytest.raises(InfluenceError, match=message):
        SOLVERS[name](lambda u: u @ matrix, v, **limits)


@pytest.mark.parametrize("solve", [conjugate_gradients, nystrom, partial(lissa, lambda u: u)])
def test_no_iteration_at_all_is_refused(solve: Solve) -> None:
    with pytest.raises(InfluenceError, match="a limit of 0 iterations"):
        solve(lambda u: u, torch.ones(1, 3), max_iterations=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_product_that_is_not_finite_gives_no_numbers(name: str) -> None:
    with pytest.raises(InfluenceError):
        SOLVERS[name](lambda u: u * float("nan"), torch.ones(2, 20))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.quick("cg*", "neumann")
def test_random_problems(name: str) -> None:
    """Positive definite ones, of condition up to 1e4, converge by themselves; indefinite ones are reported as such."""
    # A series takes thousands of products where CG takes tens.
    for seed in range(20 if name in ("lissa", "neumann") else 100):
        generator = seeded(seed)
        size, rows, digits = (
            int(torch.randint(*ends, (1,), generator=generator)) for ends in ((2, 40), (1, 5), (-6, 7))
        )
        dtype = torch.float64 if seed % 4 < 2 else torch.float32
        # Up to 1e4; the square spares the series, whose steps are in proportion to it, some of the largest ones.
        condition = 10 ** (4 * float(torch.rand(1, generator=generator)) ** 2) if seed > 1 else 1e4
        values = condition ** -torch.rand(size, dtype=torch.float64, generator=generator)
        values[0], values[-1] = 1, 1 / condition
        indefinite = seed % 2 == 1
        if indefinite:
            values[-1] *= -1
        matrix = 10.0**digits * matrix_of(values, seed)
        v = torch.randn(rows, size, dtype=torch.float64, generator=generator)
        own = matrix.to(dtype)
        if indefinite:
            with pytest.raises(InfluenceError, match="not positive definite"):
                SOLVERS[name](lambda u, own=own: u @ own, v.to(dtype))
            continue
        x, info = SOLVERS[name](lambda u, own=own: u @ own, v.to(dtype), tolerance=1e-2)
        assert info.converged, (seed, info)
        assert x.dtype == dtype
        left = (v - x.double() @ matrix).norm(dim=1) / v.norm(dim=1)
        assert float(left.max()) < 1.1e-2, (seed, info)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9, 40])
@pytest.mark.parametrize("rows", [1, 4])
def test_no_more_products_than_allowed_and_all_are_counted(most: int, rows: int) -> None:
    matrix, v, _ = problem()
    taken: list[int] = []

    def product(u: Tensor) -> Tensor:
        taken.append(len(u))
        return u @ matrix

    x, info = conjugate_gradients(product, v[:rows], tolerance=1e-9, max_iterations=most)
    assert info.iterations == len(taken) <= most
    assert info.products == sum(taken)
    left = (v[:rows] - x @ matrix).norm(dim=1) / v[:rows].norm(dim=1)
    assert info.residual == pytest.approx(float(left.max()), rel=1e-6)


# --- a few products


def test_enough_of_few_products_solve_with_a_shift_of_every_layer() -> None:
    matrix, v = (tensor.double() for tensor in problem(condition=30.0)[:2])
    shift = torch.cat([torch.full((20,), value, dtype=torch.float64) for value in (0.01, 0.5, 4.0)])
    whole = matrix + torch.diag(shift)
    inverse = torch.linalg.inv(torch.diag(matrix.diagonal() + shift))
    expected = torch.linalg.solve(whole, v.T).T
    x, info = few_products(lambda u: u @ whole, v, 60, precondition=lambda r: r @ inverse)
    assert float((x - expected).norm() / expected.norm()) < 1e-8
    assert info.residual < 1e-8
    assert (info.iterations, info.products, info.tolerance, info.converged) == (60, 60 * len(v), None, None)


def test_they_are_those_of_the_textbook_whatever_is_solved_along() -> None:
    matrix, v = (tensor.double() for tensor in problem()[:2])
    inverse = torch.diag(1 / matrix.diagonal())
    taken: list[int] = []

    def product(u: Tensor) -> Tensor:
        taken.append(len(u))
        return u @ matrix

    x, info = few_products(product, v, 3, precondition=lambda r: r @ inverse)
    assert taken == [len(v)] * 3
    left = (v - x @ matrix).norm(dim=1) / v.norm(dim=1)
    assert info.residual == pytest.approx(float(left.max()))
    for row, right in zip(x, v, strict=True):
        # The minimiser of the energy over the three preconditioned Krylov directions.
        basis = [inverse @ right]
        for _ in range(2):
            basis.append(inverse @ (matrix @ basis[-1]))
        p = torch.linalg.qr(torch.stack(basis).T)[0]
        expected = p @ torch.linalg.solve(p.T @ matrix @ p, p.T @ right)
        assert float((row - expected).norm() / expected.norm()) < 1e-9
        alone = few_products(lambda u: u @ matrix, right[None], 3, precondition=lambda r: r @ inverse)[0]
        assert torch.allclose(alone[0], row, rtol=1e-12, atol=1e-14)


def test_few_products_of_a_zero_and_of_an_indefinite_matrix() -> None:
    matrix, v, _ = problem()
    x, info = few_products(lambda u: u @ matrix, torch.zeros_like(v), 3, precondition=lambda r: r)
    assert not bool(x.any())
    assert info.residual == 0
    with pytest.raises(InfluenceError, match="not positive definite"):
        few_products(lambda u: -(u @ matrix), v, 3, precondition=lambda r: r)


# --- on a network

loss = partial(nn.functional.cross_entropy, reduction="none")


def small_network(dtype: torch.dtype) -> tuple[Network, Tensor, Tensor]:
    """A smooth convolutional network, not at a minimum: its Hessian is indefinite."""
    torch.manual_seed(0)
    conv, dense, head = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(8, 4), nn.Linear(4, 3)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), dense, nn.Tanh(), head)
    inputs, targets = torch.randn(24, 1, 6, 6, generator=seeded(1)), torch.randint(0, 3, (24,), generator=seeded(2))
    model, inputs = model.to(dtype).eval(), inputs.to(dtype)
    return make_network(track(model, loss, ("*",), "layers"), inputs), inputs, targets


def whole(network: Network, inputs: Tensor, targets: Tensor, matrix: str) -> Tensor:
    positions = torch.arange(len(targets)).numpy()
    return curvature_matrix(network, [Batch(inputs, targets, positions)], matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("method", ["plain cg", "cg", "nystrom", "lissa", "neumann"])
@pytest.mark.quick("cg-*", "lissa-hessian-dtype0", "neumann-ggn-dtype0", "nystrom-ggn-dtype0")
def test_it_agrees_with_a_direct_solve_on_a_network(method: str, matrix: str, dtype: torch.dtype) -> None:
    network, inputs, targets = small_network(dtype)
    exact = whole(network, inputs, targets, matrix)
    ends = torch.linalg.eigvalsh(exact)
    least = 2 * abs(float(ends[0])) if matrix == "hessian" else 0.0
    assert least > 1e-3 or matrix == "ggn"
    v = example_gradients(network, inputs[:3], (targets[:3] + 1) % 3)[0].detach()
    examples, identity = Examples(inputs, targets, 12), torch.eye(len(exact), dtype=torch.float64)
    halves = [whole(network, inputs[part], targets[part], matrix) for part in (slice(0, 12), slice(12, 24))]
    for extra in (0.05, 0.3, 1.0):
        shift = least + extra * float(ends[-1])
        product = mean_product(network, examples, matrix, shift)
        precondition = None
        if method in ("cg", "neumann"):
            # Not all rows: what they leave out costs iterations, not accuracy.
            precondition = row_preconditioner(heaviest_rows(network, examples, 12), shift)
        if method.endswith("cg"):
            x, info = conjugate_gradients(product, v, precondition=precondition, tolerance=3e-6)
        elif method == "nystrom":
            x, info = nystrom(product, v, rank=20, tolerance=3e-6)
        else:
            # The mini-batches' matrices themselves: their products are tested elsewhere, and there are many.
            batches = cycle([(half + shift * identity).to(dtype) for half in halves])
            x, info = lissa(lambda u, b=batches: u @ next(b), product, v, precondition=precondition, tolerance=1e-5)
        assert info.converged, info
        assert x.dtype == dtype
        assert distance(x, torch.linalg.solve(exact + shift * identity, v.double().T).T) < 1e-4, (extra, info)


@pytest.mark.parametrize("batch", [5, 24])
def test_all_rows_make_the_ggn(batch: int) -> None:
    network, inputs, targets = small_network(torch.float32)
    exact = whole(network, inputs, targets, "ggn")
    examples = Examples(inputs, targets, batch)
    rows = heaviest_rows(network, examples)
    assert torch.allclose((rows.T @ rows).double(), exact, atol=1e-6)
    few = heaviest_rows(network, examples, 8)
    assert len(few) == 8
    # The rest is positive semi-definite: nothing is counted twice, and none is heavier.
    assert float(torch.linalg.eigvalsh(exact - (few.T @ few).double())[0]) > -1e-6
    for some in (rows, few):
        r = torch.randn(3, network.size, generator=seeded(4))
        direct = torch.linalg.inv((some.T @ some).double() + 0.01 * torch.eye(network.size))
        assert distance(row_preconditioner(some, 0.01)(r), r.double() @ direct) < 1e-4


@pytest.mark.parametrize("method", SOLVERS)
def test_a_hessian_with_too_small_a_shift_gives_no_numbers(method: str) -> None:
    network, inputs, targets = small_network(torch.float32)
    exact = whole(network, inputs, targets, "hessian")
    shift = 0.5 * abs(float(torch.linalg.eigvalsh(exact)[0]))
    shifted = (exact + shift * torch.eye(len(exact))).float()
    v = example_gradients(network, inputs[:3], (targets[:3] + 1) % 3)[0].detach()
    with pytest.raises(InfluenceError, match="not positive definite"):
        SOLVERS[method](lambda u: u @ shifted, v)


def test_its_spectrum_is_measured() -> None:
    network, inputs, targets = small_network(torch.float32)
    values = torch.linalg.eigvalsh(whole(network, inputs, targets, "hessian"))
    product = mean_product(network, Examples(inputs, targets, 24), "hessian", 0.0)
    ends = lanczos(product, network.size, like=inputs, iterations=30)
    assert ends.smallest == pytest.approx(float(values[0]), rel=0.1)
    assert ends.largest == pytest.approx(float(values[-1]), rel=1e-3)
    assert ends.mean == pytest.approx(float(values.mean()), rel=0.3)


def test_a_floor_below_the_rounding_of_the_rows_is_raised() -> None:
    rows = torch.randn(5, 40, generator=seeded(0)).repeat(3, 1)
    for some in (rows, torch.cat([rows, rows, rows])):
        r = torch.randn(2, 40, generator=seeded(1))
        assert bool(row_preconditioner(some, 1e-30)(r).isfinite().all())
