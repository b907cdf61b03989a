"""Time pyDVL: EK-FAC over the Linear layers, and conjugate gradients over all parameters for one test image.

ENV/bin/python bench/peers/time_pydvl.py CASE_FOLDER OUT.json [--scores OUT.npz]
"""

from __future__ import annotations

import torch
from common import Case, Counted, Log, run_tests, start
from pydvl.influence.torch import CgInfluence, EkfacInfluence
from torch import Tensor, nn
from torch.utils.data import DataLoader

CONVENTIONS = """ekfac: Linear layers only (others raise NotImplementedLayerRepresentationException, so their parameters
    are frozen), diagonal refitted; the curvature is not a Fisher but the outer product of the gradient of
    sum_c sqrt(p_c) log p_c, averaged over examples. cg: the Hessian of the mean loss plus the damping, all parameters,
    rtol 1e-4, at most 10 iterations a parameter (defaults), for one test image. Scores are + g_test' (H + damping)^-1
    g_train, not divided by n. Damping null is read as 1e-3: pyDVL has no rule of its own. Self-influence is offered
    only as the diagonal of the square matrix of a batch of training images."""
BATCH = {"cnn": 100, "resnet18": 20}
DAMPING = 1e-3


def loader(case: Case, log: Log, batch: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Read the training images in order."""
    return DataLoader(Counted(case.x, case.y, log), batch_size=batch)


def score(influence: EkfacInfluence | CgInfluence, x: Tensor, y: Tensor, data: DataLoader) -> Tensor:
    """Precondition the test gradients once, then take them against the training images batch by batch."""
    factors = influence.influence_factors(x, y)
    return torch.cat([influence.influences_from_factors(factors, *batch) for batch in data], dim=1)


def main() -> None:
    """Run both methods on one case."""
    case, log = start("pyDVL", "pydvl", CONVENTIONS)
    n, batch = len(case.x), BATCH[case.settings.model]
    damping = DAMPING if case.settings.damping is None else case.settings.damping
    data = loader(case, log, batch)

    model = case.model()
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    log.record["tracked_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)

    ekfac = log.run(
        "ekfac",
        "fit",
        lambda: EkfacInfluence(model, update_diagonal=True, hessian_regularization=damping).fit(data),
        total=2 * n,
    )
    if ekfac is not None:
        scores = log.run(
            "ekfac", "self", lambda: torch.cat([ekfac.influences(*batch).diagonal() for batch in data]), total=n
        )
        if scores is not None:
            log.keep(ekfac_self=scores)
        run_tests(log, case, "ekfac", lambda x, y, _: score(ekfac, x, y, data), passes=1)

    cg = CgInfluence(case.model(), nn.functional.cross_entropy, regularization=damping)
    cg = log.run("cg", "fit", lambda: cg.fit(data))
    if cg is not None:
        log.add("cg", "self", unsupported="one linear solve for every training image")
        log.run("cg", "tests_1", lambda: score(cg, case.test_x[:1], case.test_y[:1], data))
        log.record["cg_passes"] = round(log.done / n, 1)
        log.write()


if __name__ == "__main__":
    main()
