"""influence verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    Amount,
    ConfigFile,
    Format,
    OnTheFly,
    Output,
    Plot,
    Quiet,
    Set,
    Verbose,
    VerifyOptions,
    read_amount,
    refuse_verify,
)
from influence_cli.errors import InfluenceError
from influence_cli.results.record import DatamodelingRecord, TopRecord
from influence_cli.results.verify_rows import (
    CHECK_COLUMNS,
    LDS_COLUMNS,
    LOO_COLUMNS,
    TOP_COLUMNS,
    lds_rows,
    loo_rows,
    top_rows,
)

if TYPE_CHECKING:
    from influence_cli.config.schema import Config
    from influence_cli.influence.test_selection import Selected
    from influence_cli.model.task import Task
    from influence_cli.results.run import Session

# Subsets and test examples of --lds, test examples of --top; what a subset leaves out in the same run.
SUBSETS, LDS_TESTS, TOP_TESTS, SAME_RUN_DROP = 100, 300, 5, "1%"


def command(
    tests: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEST]...", help="Test images, as for rank. Default: the first misclassified one."),
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    loo: Annotated[
        int | None,
        typer.Option(
            "--loo",
            min=1,
            metavar="K",
            help="Leave out K training examples, one at a time, and train again without each.",
        ),
    ] = None,
    lds: Annotated[
        bool,
        typer.Option("--lds", help="Train on random halves: gives the linear datamodeling score, for any network."),
    ] = False,
    top: Annotated[
        str | None,
        typer.Option(
            "--top",
            metavar="K|K%",
            help="Train without the K (or K%) strongest helpful images of a test example, and without random ones.",
        ),
    ] = None,
    subsets: Annotated[
        int | None,
        typer.Option("--subsets", min=3, metavar="M", help=f"With --lds: random subsets (default {SUBSETS})."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            min=1,
            metavar="R",
            help="Trainings per subset (--lds, default 2), example (--loo, 1) or set of images (--top, 1).",
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--tests",
            min=1,
            metavar="N",
            help=f"Test examples: random ones (--lds, default {LDS_TESTS}), or over the classes (--top, {TOP_TESTS}).",
        ),
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop", metavar="K|K%", help="With --lds: leave K (or K%) out per subset. Default: half; 1% in one run."
        ),
    ] = None,
    same_run: Annotated[
        bool,
        typer.Option(
            "--same-run", help="With --lds: train with the seed, order and start of the run itself (training.recipe)."
        ),
    ] = False,
    measure: Annotated[
        str,
        typer.Option(
            "--measure",
            metavar="loss|margin",
            help="With --lds or --top: measure the loss, or log(p/(1 − p)) of the label with its sign changed.",
        ),
    ] = "loss",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B,…",
            help="With --lds: values of curvature.method to compare. Each has its own store.",
        ),
    ] = None,
    plot: Plot = None,
    on_the_fly: OnTheFly = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check whether influence holds for this model and data.

    Without --loo, --lds and --top nothing is trained. The command then measures how well s_test is solved, whether the
    checkpoint is at a minimum, and how much of the score the store keeps.

    --loo compares estimated with actual changes of a loss. --lds is the test for deep networks. --top says what the
    strongest helpful images are worth: how far a loss rises without them. Trainings are kept and shared by all
    processes that run the same command. After a kill, run the same command to resume. With several checkpoints --lds
    has one row per number of checkpoints (for one run: the last ones), and gain is what one more adds.

    All train by the recipe or with the function of the config (training:). One exception: --loo retrains an output
    layer under a convex loss by itself. For an SVM that smooth_hinge explains it uses training:, if there is one.

    Examples:

      influence verify

      influence verify 17 --loo 40 --plot loo.svg

      influence verify --lds --subsets 100 --repeats 2 --methods ekfac,identity

      influence verify --lds --drop 5% --measure margin

      influence verify --top 1% --tests 10
    """
    from influence_cli.results.session import begin

    asked = VerifyOptions(
        tests or [], loo, lds, top, subsets, repeats, number, drop, same_run, measure, methods, plot, on_the_fly
    )
    refuse_verify(asked)
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output, files=(plot,))
    if lds:
        _lds(session, _method_configs(session.config, config, set_, methods), asked)
    elif top is not None:
        _top(session, read_amount("--top", top), asked)
    elif loo is not None:
        _loo(session, loo, asked)
    else:
        _self_check(session, asked.words, on_the_fly=on_the_fly)


def _self_check(session: Session, words: list[str], *, on_the_fly: bool) -> None:
    from influence_cli.influence.ensemble import refuse_source
    from influence_cli.replay.prepare import prepare_scores, refuse_replay
    from influence_cli.results.session import emit, load
    from influence_cli.retrain.self_check import check_estimates

    refuse_source(session.config.model.ensemble, "verify without --lds", "there is no s_test to check")
    refuse_replay(
        session.config,
        "verify without --lds, --top or --loo checks the solution s_test",
        "influence check gives the verdict on the run; influence verify --lds --same-run trains again",
    )
    tasks = load(session)
    selected = _select(session, tasks, words)
    stores = prepare_scores(session.config, tasks, session.terminal, on_the_fly=on_the_fly)
    checks = check_estimates(stores, selected, terminal=session.terminal)
    emit(session, (vars(line) for line in checks), CHECK_COLUMNS)
    session.terminal.say("next: influence verify --loo 20 (a convex model), or influence verify --lds (any network)")


def _select(session: Session, tasks: list[Task], words: list[str]) -> list[Selected]:
    """Resolve TEST. The default is the first misclassified test example, or the first one if none is misclassified."""
    from influence_cli.model.predictions import misclassified
    from influence_cli.results.session import selected_tests

    if not words:
        wrong = misclassified(tasks, session.terminal)
        first = int(wrong[0]) if len(wrong) else int(tasks[0].labelled_tests().indices[0])
        kind = "the first misclassified one" if len(wrong) else "the first one, because none is misclassified"
        session.terminal.say(f"test example {first}: {kind}")
        words = [str(first)]
    return selected_tests(session, tasks, words)


def _loo(session: Session, count: int, asked: VerifyOptions) -> None:
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.report.plot import scatter
    from influence_cli.results.session import emit, load
    from influence_cli.results.verify_words import describe_left_out, is_poor
    from influence_cli.retrain.leave_one_out import leave_one_out
    from influence_cli.retrain.retraining import Retraining

    tasks = load(session)
    selected = _select(session, tasks, asked.words)
    stores = prepare_scores(session.config, tasks, session.terminal, on_the_fly=asked.on_the_fly)
    facts = training_facts(stores)
    result = leave_one_out(
        stores,
        selected,
        retraining=Retraining(session.config),
        count=count,
        repeats=asked.repeats or 1,
        facts=facts,
        terminal=session.terminal,
    )
    effects, session.run.scores, session.run.newton = result.left_out, result.scores, result.newton
    session.run.fits = tuple(describe_left_out(left_out, stores[0], session.terminal) for left_out in effects)
    emit(session, loo_rows(stores[0], effects, facts), LOO_COLUMNS)
    poor = any(is_poor(left_out) for left_out in effects)
    # Newton steps minimise the objective of the config, whatever was trained: they cannot disagree with it.
    if poor or result.newton is not None:
        _hint(session, tasks, 0, poor=poor)
    if asked.plot is not None:
        r, slope, _ = effects[0].fit()
        scatter(asked.plot, effects[0].estimated, effects[0].actual, r, slope)
        more = " (first test example)" if len(effects) > 1 else ""
        session.terminal.say(f"wrote {asked.plot}{more}")


def _hint(session: Session, tasks: list[Task], number: int, *, poor: bool) -> None:
    """Say which part of the objective of a checkpoint may be another one than the config's."""
    from influence_cli.precompute.check import objective_hint

    text = objective_hint(session.config, number, tasks[number], session.terminal, poor=poor)
    if text:
        session.terminal.warn(text)


def _method_configs(loaded: Config, path: Path, set_: list[str] | None, methods: str | None) -> dict[str, Config]:
    """Give each method a config: the run's own for its own method, otherwise one with a store named after it."""
    from influence_cli.config.load import load_config

    method = loaded.curvature.method
    if methods is None:
        return {loaded.model.ensemble if loaded.model.is_one_run else method: loaded}
    configs = {}
    for name in (part.strip() for part in methods.split(",")):
        if name in configs:
            raise InfluenceError(
                f"--methods {methods}: {name or 'an empty name'} is listed twice", "list each method once"
            )
        try:
            config = load_config(path, [*(set_ or []), f"curvature.method={name}"])
        except InfluenceError as error:
            raise InfluenceError(f"--methods {methods}: {error.message.partition(': ')[2]}", error.hint) from error
        # A replay has no store; the record of its run is beside that of the config.
        if name not in (method, "replay"):
            store = config.gradients.store
            named = store.with_name(f"{store.stem}.{name}{store.suffix}")
            config = config.model_copy(update={"gradients": config.gradients.model_copy(update={"store": named})})
        configs[name] = config
    return configs


def _lds(session: Session, methods: dict[str, Config], asked: VerifyOptions) -> None:
    from influence_cli.report.plot import scatter
    from influence_cli.results.session import emit, load
    from influence_cli.results.verify_words import lds_words
    from influence_cli.retrain.lds import datamodeling_score
    from influence_cli.retrain.random_subsets import LdsPlan
    from influence_cli.retrain.retraining import Retraining

    retraining = Retraining(session.config)
    if asked.same_run:
        retraining.check_steps("--same-run")
    tasks = load(session)
    drop = asked.drop or (SAME_RUN_DROP if asked.same_run else None)
    plan = LdsPlan(
        asked.subsets or SUBSETS,
        asked.repeats or (1 if asked.same_run else 2),
        asked.tests or LDS_TESTS,
        None if drop is None else read_amount("--drop", drop).of(len(tasks[0].train)),
        asked.measure,
        asked.same_run,
    )
    lds = datamodeling_score(
        methods, tasks, retraining=retraining, plan=plan, on_the_fly=asked.on_the_fly, terminal=session.terminal
    )
    session.run.datamodeling = DatamodelingRecord(
        lds.training_seconds, lds.records, lds.agreement(), lds.left_out, plan.measure, plan.same_run
    )
    for sentence, is_warning in lds_words(lds):
        (session.terminal.warn if is_warning else session.terminal.say)(sentence)
    if lds.mean(0)[1] <= 0 and not session.config.model.is_one_run and plan.measure == "loss":
        _hint(session, tasks, len(tasks) - 1, poor=True)
    emit(session, lds_rows(lds), LDS_COLUMNS)
    if asked.plot is not None:
        (r, _, _), (slope, _, _) = lds.fit(0)
        heading = f"the same run without {lds.left_out:,} images, {len(lds.tests):,} test examples"
        scatter(asked.plot, lds.predicted[0, -1].ravel(), lds.actual[0].ravel(), r, slope, heading=heading)
        session.terminal.say(f"wrote {asked.plot}")


def _top(session: Session, amount: Amount, asked: VerifyOptions) -> None:
    from influence_cli.influence.measure import check_measure
    from influence_cli.metrics import pearson, slope
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.report.plot import scatter
    from influence_cli.results.session import emit, load, selected_tests
    from influence_cli.results.verify_words import top_words
    from influence_cli.retrain.from_start import from_start
    from influence_cli.retrain.retraining import Retraining
    from influence_cli.retrain.strongest import check_positions, drawn_over_classes, without_strongest

    tasks = load(session)
    task, n = tasks[0], len(tasks[0].train)
    check_measure(task, asked.measure)
    count, split = amount.of(n), task.labelled_tests()
    selected = selected_tests(session, tasks, asked.words) if asked.words else []
    selected = selected or drawn_over_classes(split, asked.tests or TOP_TESTS, session.config.seed)
    check_positions(selected, split)
    runs = from_start(Retraining(session.config), task)
    stores = prepare_scores(session.config, tasks, session.terminal, on_the_fly=asked.on_the_fly)
    found = without_strongest(
        stores,
        selected,
        runs=runs,
        count=count,
        repeats=asked.repeats or 1,
        measure=asked.measure,
        terminal=session.terminal,
    )
    session.run.scores = found.scores
    estimated = float(found.estimated.mean())
    means = found.means()
    session.run.top = TopRecord(
        count, len(found.tests), len(found.actual), found.measure, estimated, **means, training_seconds=found.seconds
    )
    for sentence in top_words(found, n):
        session.terminal.say(sentence)
    emit(session, top_rows(task.classes, found), TOP_COLUMNS)
    if asked.plot is not None:
        actual = found.actual.mean(axis=0)
        line = pearson(found.estimated, actual), slope(found.estimated, actual)
        heading = f"without the {count:,} strongest images, {len(found.tests):,} test examples"
        scatter(asked.plot, found.estimated, actual, *line, heading=heading)
        session.terminal.say(f"wrote {asked.plot}")
