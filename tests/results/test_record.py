"""What a command noted, as the JSON of FILE.run.json: only what was noted, under the old keys, in the old order."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path

import pytest

from influence_cli.influence.run_facts import ScoreRecord, StoreRecord
from influence_cli.mislabels.evaluation import Recovery
from influence_cli.ranking.damping_sweep import AtDamping
from influence_cli.ranking.index_search import SearchRecord, Spent
from influence_cli.results.label_records import EvidenceRecord
from influence_cli.results.record import (
    DatamodelingRecord,
    FitRecord,
    GroupRetrainRecord,
    LeftOutRecord,
    RunRecord,
    SweepRecord,
    record_facts,
)
from influence_cli.retrain.output_layer import NewtonRecord
from influence_cli.solvers.cg import SolveInfo

SWEEP = SweepRecord("influence, the test example", 10, "it holds", (AtDamping(0.1, "0.001"),))


def test_nothing_noted_is_nothing() -> None:
    assert record_facts(RunRecord()) == {}


def test_a_sweep_of_rank_stands_before_its_scores_and_one_of_mislabels_last() -> None:
    rank = RunRecord(normalise="relatif", processes=2, damping_sweep=SWEEP, scores=ScoreRecord((), 0.5))
    assert list(record_facts(rank)) == ["normalise", "processes", "damping_sweep", "identity_correlation", "stores"]
    mislabels = RunRecord(
        processes=2,
        damping_sweep=SWEEP,
        scores=ScoreRecord(()),
        evidence=EvidenceRecord({"ridge": 1.0}, True),
        truth=(),
        recovery=Recovery((0.0, 1.0), {"loss": [0.0, 1.0]}),
    )
    facts = record_facts(mislabels)
    assert list(facts) == ["processes", "stores", "evidence", "truth", "recovery", "damping_sweep"]
    assert facts["evidence"] == {"ridge": 1.0, "memorised": True}
    assert facts["recovery"] == {"checked": (0.0, 1.0), "loss": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("measured", "written"),
    [(None, {}), (nan, {"identity_correlation": None}), (0.25, {"identity_correlation": 0.25})],
)
def test_a_correlation_is_absent_where_it_was_not_measured_and_null_where_there_is_none(
    measured: float | None, written: dict[str, object]
) -> None:
    assert record_facts(RunRecord(scores=ScoreRecord((), measured))) == {**written, "stores": []}


def test_the_solves_of_a_store_are_in_it() -> None:
    info = SolveInfo("cg", 3, 6, 1e-5, 1e-4, True)
    store = StoreRecord(
        "s.h5", "m.pt", "cg", "ggn", "float32", 5, 0, 5, 0.1, 7, {"a": 1.0}, "given", None, 1.0, 0.0, None, (info,)
    )
    (facts,) = json.loads(json.dumps(record_facts(RunRecord(scores=ScoreRecord((store,))))))["stores"]
    assert list(facts)[:3] == ["store", "checkpoint", "method"]
    assert facts["damping"] == {"a": 1.0}
    assert facts["solves"] == [vars(info)]


def test_what_retraining_found_keeps_its_keys() -> None:
    fit = FitRecord(0.9, 1.0, None, 4)
    record = RunRecord(
        newton=NewtonRecord(1e-2, 1e-9),
        retrain=GroupRetrainRecord(2, None, "retraining agrees"),
        verdict="a drives it",
        fits=(LeftOutRecord(17, None, fit, fit, fit),),
        datamodeling=DatamodelingRecord(2.5, {"ekfac": ScoreRecord((), 0.5)}, None),
    )
    facts = record_facts(record)
    assert facts["retrain"] == {"groups": 2, "verdict": "retraining agrees"}
    assert facts["methods"] == {"ekfac": {"identity_correlation": 0.5, "stores": []}}
    assert facts["agreement_of_repeats"] is None
    assert facts["trained"] == {"left_out": 0, "measure": "loss", "same_run": False}
    assert facts["fits"] == [
        {"test": 17, "test_path": None} | dict.fromkeys(("all", "most influential", "random"), vars(fit))
    ]
    with_fit = record_facts(RunRecord(retrain=GroupRetrainRecord(3, (0.5, None), None)))
    assert with_fit == {"retrain": {"groups": 3, "r": 0.5, "slope": None}}


def test_a_search_lists_what_it_took_and_its_indexes() -> None:
    search = SearchRecord(Spent(2, 0.5, 1.5, 7), 9, ((Path("a.index"), {"kind": "ivf", "blocks": 9}),))
    assert record_facts(RunRecord(approximate=search))["approximate"] == {
        "queries": 2,
        "search_seconds": 0.5,
        "scoring_seconds": 1.5,
        "blocks_read": 7,
        "blocks": 9,
        "indexes": [{"index": "a.index", "kind": "ivf", "blocks": 9}],
    }
