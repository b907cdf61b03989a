"""What a command noted about its run, and the JSON of FILE.run.json that is made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from math import isnan
from typing import TYPE_CHECKING

from influence_cli.report.table import Scalar
from influence_cli.results.label_records import (
    DataIssuesRecord,
    DecisionCounts,
    DuplicatesRecord,
    EvidenceRecord,
    NoiseRecord,
    RelabelledPair,
)

if TYPE_CHECKING:
    from influence_cli.influence.run_facts import ScoreRecord
    from influence_cli.mislabels.evaluation import Quality, Recovery
    from influence_cli.model.predictions import Predicted
    from influence_cli.ranking.damping_sweep import AtDamping
    from influence_cli.ranking.index_search import SearchRecord
    from influence_cli.results.compare import Comparison
    from influence_cli.results.label_records import ReviewedRecord, SampledRecord
    from influence_cli.retrain.output_layer import NewtonRecord


@dataclass(frozen=True)
class SweepRecord:
    """A ranking at other λ: which ranking, how many of the first are compared, the verdict, and one row per λ."""

    ranking: str
    top: int
    verdict: str
    rows: tuple[AtDamping, ...]


@dataclass(frozen=True)
class GroupsRecord:
    """Groups of training examples: the column, how many there are, and how often chance gives as harmful a group."""

    by: str
    groups: int
    test_examples: int
    worst_by_chance: float


@dataclass(frozen=True)
class GroupRetrainRecord:
    """Groups that were left out: how many, actual on estimated effects (r, slope), and what retraining finds."""

    groups: int
    fit: tuple[float | None, float | None] | None
    verdict: str | None


@dataclass(frozen=True)
class FitRecord:
    """The fit of actual on estimated effects of leaving examples out; None for a number that is not finite."""

    r: float | None
    slope: float | None
    intercept: float | None
    examples: int


@dataclass(frozen=True)
class LeftOutRecord:
    """The fits of one test example: over all examples left out, the most influential and the random ones."""

    test: int | None
    test_path: str | None
    all: FitRecord
    most_influential: FitRecord
    random: FitRecord


@dataclass(frozen=True)
class DatamodelingRecord:
    """Linear datamodeling scores: what trainings took, the run of each method, and how repeatable the losses are.

    The last three say what was trained and measured: examples that each subset leaves out, the measure, and whether all
    trainings are the run itself but for these examples.
    """

    training_seconds: float
    methods: dict[str, ScoreRecord]
    agreement_of_repeats: float | None
    left_out: int = 0
    measure: str = "loss"
    same_run: bool = False


@dataclass(frozen=True)
class TopRecord:
    """Training without the strongest images: the mean rises with their 95% intervals, (value, low, high) each."""

    left_out: int
    tests: int
    repeats: int
    measure: str
    estimated: float
    actual: tuple[float, float, float]
    random: tuple[float, float, float]
    difference: tuple[float, float, float]
    training_seconds: float


@dataclass(frozen=True)
class AttackRecord:
    """How many predictions were attacked and flipped; low and high are the 95% interval of the share."""

    attacked: int
    flipped: int
    low: float
    high: float


@dataclass(frozen=True)
class DistanceRecord:
    """How influence on one test example changes with pixel distance, in one of the results."""

    result: str
    test: Scalar
    test_path: Scalar
    numbers: dict[str, float | int | None]


@dataclass(frozen=True)
class SelectionRecord:
    """How images were left out: by what, why by that, and in how many rounds."""

    by: str
    why: str
    rounds: int


@dataclass
class RunRecord:
    """What a command noted about its run so far; None means not noted.

    Attributes:
        normalise: what influence is ranked by, of ``rank --normalise``.
        proxy: what network the numbers are of, where it is not the user's.
        selection: how ``select`` left images out.
        processes: of the job, where there are several.
        damping_sweep: the ranking at other λ.
        scores: stores, λ, residuals and likeness to plain gradient similarity.
        approximate: the search of ``rank --approximate``.
        newton: the minimum that retraining started from.
        retrain: groups that were left out.
        groups: what was grouped.
        verdict: which group drives the errors.
        fits: of ``verify --loo``, one per test example.
        datamodeling: of ``verify --lds``.
        top: of ``verify --top``.
        evidence: what speaks for and against labels.
        issues: data issues beyond single labels.
        noise: how many labels are wrong.
        reviewed: what a person decided.
        sample: what was drawn at random, as ``sample_facts`` gives it.
        sampled: how many labels are wrong by the decisions on it.
        memorised_share: of the wrong labels, those that the model predicts.
        truth: how well each signal finds the wrong labels.
        recovery: the curves of these.
        decisions: how many of each kind.
        relabelled: the pairs of labels, the most frequent first.
        attack: how many predictions flipped.
        attackable: predictions that one training image could flip.
        comparisons: one per list that two results share.
        distances: one per test example and result.
        neighbours: by position of an example those of the most similar ones, nearest first, with spaces between.
        duplicates: the copies among the images.
        kinds: of ``issues``: how many there are of each kind, by split.
        predicted: how the model predicts the test set, where all of it was predicted.
    """

    normalise: str | None = None
    proxy: str | None = None
    selection: SelectionRecord | None = None
    processes: int | None = None
    damping_sweep: SweepRecord | None = None
    scores: ScoreRecord | None = None
    approximate: SearchRecord | None = None
    newton: NewtonRecord | None = None
    retrain: GroupRetrainRecord | None = None
    groups: GroupsRecord | None = None
    verdict: str | None = None
    fits: tuple[LeftOutRecord, ...] | None = None
    datamodeling: DatamodelingRecord | None = None
    top: TopRecord | None = None
    evidence: EvidenceRecord | None = None
    issues: DataIssuesRecord | None = None
    noise: NoiseRecord | None = None
    reviewed: ReviewedRecord | None = None
    sample: dict[str, object] | None = None
    sampled: SampledRecord | None = None
    memorised_share: float | None = None
    truth: tuple[Quality, ...] | None = None
    recovery: Recovery | None = None
    decisions: DecisionCounts | None = None
    relabelled: tuple[RelabelledPair, ...] | None = None
    attack: AttackRecord | None = None
    attackable: int | None = None
    comparisons: tuple[Comparison, ...] | None = None
    distances: tuple[DistanceRecord, ...] | None = None
    neighbours: dict[str, str] | None = None
    duplicates: DuplicatesRecord | None = None
    kinds: dict[str, dict[str, int]] | None = None
    predicted: Predicted | None = None


def record_facts(record: RunRecord) -> dict[str, object]:
    """Give the JSON of a record. Its keys and their order are those that FILE.run.json has always had."""
    # The sweep of mislabels comes after everything else that it finds, that of rank before its scores.
    sweeps_last = record.evidence is not None
    return {
        **_noted(
            normalise=record.normalise, proxy=record.proxy, selection=record.selection, processes=record.processes
        ),
        **({} if sweeps_last else _noted(damping_sweep=record.damping_sweep)),
        **_of_scores(record.scores),
        **_noted(
            approximate=_of_search(record.approximate),
            newton=record.newton,
            retrain=_of_retrain(record.retrain),
            groups=record.groups,
            verdict=record.verdict,
            fits=record.fits and [_of_left_out(fits) for fits in record.fits],
        ),
        **_of_datamodeling(record.datamodeling),
        **_noted(
            top=record.top,
            evidence=record.evidence and {**record.evidence.summary, "memorised": record.evidence.memorised},
            besides=record.issues,
            noise=record.noise,
            reviewed=record.reviewed,
            sample=record.sample,
            sampled=record.sampled,
            memorised_share=record.memorised_share,
            truth=record.truth,
            recovery=record.recovery and {"checked": record.recovery.checked, **record.recovery.recovered},
        ),
        **(_noted(damping_sweep=record.damping_sweep) if sweeps_last else {}),
        **_noted(
            decisions=record.decisions,
            relabelled=record.relabelled,
            attack=record.attack,
            attackable=record.attackable,
            comparisons=record.comparisons and [comparison.numbers() for comparison in record.comparisons],
            distances=record.distances and [_of_distance(distance) for distance in record.distances],
            neighbours=record.neighbours,
            duplicates=record.duplicates,
            kinds=record.kinds,
            test_set=record.predicted and record.predicted.numbers(),
        ),
    }


def _noted(**values: object) -> dict[str, object]:
    """Give the JSON of what was noted; None is left out."""
    return {key: _plain(value) for key, value in values.items() if value is not None}


def _plain(value: object) -> object:
    """Turn records, and tuples of them, into dicts and lists."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _of_scores(scores: ScoreRecord | None) -> dict[str, object]:
    if scores is None:
        return {}
    correlation = scores.identity_correlation
    measured = {} if correlation is None else {"identity_correlation": None if isnan(correlation) else correlation}
    return {**measured, "stores": _plain(scores.stores), **_noted(run=scores.run)}


def _of_search(search: SearchRecord | None) -> dict[str, object] | None:
    if search is None:
        return None
    indexes = [{"index": str(path), **description} for path, description in search.indexes]
    return {**_noted(**vars(search.spent)), "blocks": search.blocks, "indexes": indexes}


def _of_retrain(retrain: GroupRetrainRecord | None) -> dict[str, object] | None:
    if retrain is None:
        return None
    fit = {} if retrain.fit is None else dict(zip(("r", "slope"), retrain.fit, strict=True))
    return {"groups": retrain.groups, **fit, **_noted(verdict=retrain.verdict)}


def _of_left_out(fits: LeftOutRecord) -> dict[str, object]:
    parts = {"all": fits.all, "most influential": fits.most_influential, "random": fits.random}
    return {"test": fits.test, "test_path": fits.test_path, **_noted(**parts)}


def _of_datamodeling(score: DatamodelingRecord | None) -> dict[str, object]:
    if score is None:
        return {}
    return {
        "training_seconds": score.training_seconds,
        "methods": {name: _of_scores(scores) for name, scores in score.methods.items()},
        "agreement_of_repeats": score.agreement_of_repeats,
        "trained": {"left_out": score.left_out, "measure": score.measure, "same_run": score.same_run},
    }


def _of_distance(distance: DistanceRecord) -> dict[str, object]:
    row = {"result": distance.result, "test": distance.test, "test_path": distance.test_path}
    return {**row, **distance.numbers}
