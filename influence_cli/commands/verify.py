"""influence verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    ConfigFile,
    Format,
    OnTheFly,
    Output,
    Plot,
    Quiet,
    Set,
    Verbose,
    refuse_together,
)
from influence_cli.errors import InfluenceError
from influence_cli.results.record import DatamodelingRecord, FitRecord, LeftOutRecord
from influence_cli.results.verify_rows import CHECK_COLUMNS, LDS_COLUMNS, LOO_COLUMNS, lds_rows, loo_rows

if TYPE_CHECKING:
    from influence_cli.config.schema import Config
    from influence_cli.influence.test_selection import Selected
    from influence_cli.model.task import Task
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.results.run import Session
    from influence_cli.retrain.lds import Datamodeling
    from influence_cli.retrain.leave_one_out import LeftOut

# Correlations from which estimates count as right and as roughly right; how far a slope may be from 1.
RIGHT, ROUGHLY, NEARLY_ONE = 0.99, 0.8, 0.05
# From this far on the objective may be another one.
FACTOR = 0.5


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
    subsets: Annotated[int, typer.Option("--subsets", min=3, metavar="M", help="With --lds: random halves.")] = 100,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            min=1,
            metavar="R",
            help="Trainings per half (--lds, default 2) or per example (--loo, default 1).",
        ),
    ] = None,
    number: Annotated[int, typer.Option("--tests", min=1, metavar="N", help="With --lds: test examples.")] = 300,
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

    Without --loo and --lds nothing is trained. The command then measures how well s_test is solved, whether the
    checkpoint is at a minimum, and how much of the score the store keeps.

    --loo compares estimated with actual changes of a loss. --lds is the test for deep networks. Its trainings are kept
    and shared by all processes that run the same command. After a kill, run the same command to resume. With several
    checkpoints there is one row per number of checkpoints (for one run: the last ones), and gain is what one more adds.

    Both train with the training function of the config (training:). One exception: --loo retrains an output layer under
    a convex loss by itself. For an SVM that smooth_hinge explains it uses training:, if there is one.

    Examples:

      influence verify

      influence verify 17 --loo 40 --plot loo.svg

      influence verify --lds --subsets 100 --repeats 2 --methods ekfac,identity
    """
    from influence_cli.commands.session import begin
    from influence_cli.report.plot import check_plot

    refuse_together(loo, lds, message="--loo and --lds are two commands", hint="run one after the other")
    refuse_together(
        lds, tests, message="--lds draws random test examples, so it takes no TEST", hint="--tests N says how many"
    )
    if plot is not None and loo is None:
        raise InfluenceError("--plot needs --loo: it draws estimated against actual effects", "add --loo 40")
    if methods is not None and not lds:
        raise InfluenceError("--methods needs --lds", "influence verify --lds --methods ekfac,identity")
    check_plot(plot)
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output, files=(plot,))
    if lds:
        compared = _method_configs(session.config, config, set_, methods)
        _lds(session, compared, subsets, 2 if repeats is None else repeats, number, on_the_fly=on_the_fly)
    elif loo is not None:
        _loo(session, tests or [], loo, 1 if repeats is None else repeats, plot, on_the_fly=on_the_fly)
    else:
        _self_check(session, tests or [], on_the_fly=on_the_fly)


def _self_check(session: Session, words: list[str], *, on_the_fly: bool) -> None:
    from influence_cli.commands.session import emit, load
    from influence_cli.influence.ensemble import refuse_source
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.retrain.self_check import check_estimates

    refuse_source(session.config.model.ensemble, "verify without --lds", "there is no s_test to check")
    tasks = load(session)
    selected = _select(session, tasks, words)
    stores = prepare_scores(session.config, tasks, session.terminal, on_the_fly=on_the_fly)
    checks = check_estimates(stores, selected, terminal=session.terminal)
    emit(session, (vars(line) for line in checks), CHECK_COLUMNS)
    session.terminal.say("next: influence verify --loo 20 (a convex model), or influence verify --lds (any network)")


def _select(session: Session, tasks: list[Task], words: list[str]) -> list[Selected]:
    """Resolve TEST. The default is the first misclassified test example, or the first one if none is misclassified."""
    from influence_cli.commands.session import selected_tests
    from influence_cli.model.task import misclassified

    if not words:
        wrong = misclassified(tasks, session.terminal)
        first = int(wrong[0]) if len(wrong) else int(tasks[0].labelled_tests().indices[0])
        kind = "the first misclassified one" if len(wrong) else "the first one, because none is misclassified"
        session.terminal.say(f"test example {first}: {kind}")
        words = [str(first)]
    return selected_tests(session, tasks, words)


def _loo(session: Session, words: list[str], count: int, repeats: int, plot: Path | None, *, on_the_fly: bool) -> None:
    from influence_cli.commands.session import emit, load
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.report.plot import scatter
    from influence_cli.retrain.leave_one_out import leave_one_out
    from influence_cli.retrain.retraining import Retraining

    tasks = load(session)
    selected = _select(session, tasks, words)
    stores = prepare_scores(session.config, tasks, session.terminal, on_the_fly=on_the_fly)
    facts = training_facts(stores)
    result = leave_one_out(
        stores,
        selected,
        retraining=Retraining(session.config),
        count=count,
        repeats=repeats,
        facts=facts,
        terminal=session.terminal,
    )
    effects, session.run.scores, session.run.newton = result.left_out, result.scores, result.newton
    session.run.fits = tuple(_describe(session, left_out, stores[0]) for left_out in effects)
    emit(session, loo_rows(stores[0], effects, facts), LOO_COLUMNS)
    poor = any(_is_poor(left_out) for left_out in effects)
    # Newton steps minimise the objective of the config, whatever was trained: they cannot disagree with it.
    if poor or result.newton is not None:
        _hint(session, tasks, 0, poor=poor)
    if plot is not None:
        r, slope, _ = effects[0].fit()
        scatter(plot, effects[0].estimated, effects[0].actual, r, slope)
        more = " (first test example)" if len(effects) > 1 else ""
        session.terminal.say(f"wrote {plot}{more}")


def _describe(session: Session, left_out: LeftOut, prepared: Prepared) -> LeftOutRecord:
    """Say how well estimated and actual effects on one test example agree, and what that means."""
    classes, say = prepared.task.classes, session.terminal.say
    test, k = left_out.test, len(left_out.rows)
    parts = {
        "all": slice(None),
        "most influential": slice(0, left_out.influential),
        "random": slice(left_out.influential, None),
    }
    fits = []
    name = f"test example {test.index}" if test.index is not None else str(test.path)
    say(f"{name}, loss of {classes[test.target]}: estimated against actual effect of {k:,} left-out training examples")
    for title, part in parts.items():
        size = len(left_out.rows[part])
        r, b, a = left_out.fit(part)
        if size > 2:
            say(f"  {title} ({size:,}): r = {r:.6f}, actual = {a:+.2e} + {b:.4f} × estimated")
        fits.append(FitRecord(_finite(r), _finite(b), _finite(a), size))
    if k > 2:
        say(f"  {_verdict(*left_out.fit()[:2], prepared)}")
    return LeftOutRecord(test.index, test.path, *fits)


def _verdict(r: float, slope: float, prepared: Prepared) -> str:
    if r >= RIGHT and abs(slope - 1) <= NEARLY_ONE:
        return "influence is accurate here, in size too"
    if r >= RIGHT:
        reason = (
            "with few training examples one example has more than a first-order effect, and λ shrinks the estimate"
            if slope > 1
            else "a training that stops before its minimum goes only part of the way"
        )
        return f"influence is proportional here: the actual effect is {slope:.2f} times the estimate ({reason})"
    if r >= ROUGHLY:
        return "influence is roughly right here: trust the order, not each number"
    if prepared.choice.output is not None and prepared.task.convex_loss:
        return "influence does not predict retraining here: run influence verify to see why"
    return (
        "influence does not predict single retrainings here; that alone says little, because a deep network takes "
        "another path without one example: --lds is the test"
    )


def _is_poor(left_out: LeftOut) -> bool:
    """Say whether estimated and actual effects disagree, in order or by a factor."""
    r, slope, _ = left_out.fit()
    return len(left_out.rows) > 2 and not (r >= ROUGHLY and abs(slope - 1) <= FACTOR)


def _hint(session: Session, tasks: list[Task], number: int, *, poor: bool) -> None:
    """Say which part of the objective of a checkpoint may be another one than the config's."""
    from influence_cli.precompute.check import objective_hint

    text = objective_hint(session.config, number, tasks[number], session.terminal, poor=poor)
    if text:
        session.terminal.warn(text)


def _finite(value: float) -> float | None:
    import math

    return value if math.isfinite(value) else None


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
        if name != method:
            store = config.gradients.store
            named = store.with_name(f"{store.stem}.{name}{store.suffix}")
            config = config.model_copy(update={"gradients": config.gradients.model_copy(update={"store": named})})
        configs[name] = config
    return configs


def _lds(
    session: Session, methods: dict[str, Config], subsets: int, repeats: int, tests: int, *, on_the_fly: bool
) -> None:
    from influence_cli.commands.session import emit, load
    from influence_cli.retrain.lds import datamodeling_score
    from influence_cli.retrain.retraining import Retraining

    tasks = load(session)
    lds = datamodeling_score(
        methods,
        tasks,
        retraining=Retraining(session.config),
        subsets=subsets,
        repeats=repeats,
        tests=tests,
        on_the_fly=on_the_fly,
        terminal=session.terminal,
    )
    session.run.datamodeling = DatamodelingRecord(lds.training_seconds, lds.records, lds.agreement())
    _describe_lds(session, lds)
    if lds.mean(0)[1] <= 0 and not session.config.model.is_one_run:
        _hint(session, tasks, len(tasks) - 1, poor=True)
    emit(session, lds_rows(lds), LDS_COLUMNS)


def _describe_lds(session: Session, lds: Datamodeling) -> None:
    say = session.terminal.say
    say(
        f"linear datamodeling score: rank correlation (Spearman), over {lds.actual.shape[2]:,} halves, between the "
        f"summed influence of the left-out examples and the actual loss; mean over {len(lds.tests):,} test examples, "
        "95% interval by bootstrap over both"
    )
    agreement = lds.agreement()
    if agreement is not None:
        say(f"one half of the repeats scores {agreement:.3f} on the other: noise in the losses limits every method")
    for number, name in enumerate(lds.methods):
        value, low, high = lds.mean(number)
        if low <= 0:
            session.terminal.warn(
                f"{name}: {value:.3f} ({low:.3f} to {high:.3f}) may be chance; more --subsets narrow the interval"
            )
        if number:
            value, low, high = lds.difference(number)
            verdict = "better than" if low > 0 else "worse than" if high < 0 else "not measurably different from"
            say(f"{name} is {verdict} {lds.methods[0]}: difference {value:+.3f} ({low:+.3f} to {high:+.3f})")
        for at in range(1, lds.scores.shape[1]):
            value, low, high = lds.gain(number, at)
            verdict = "improves" if low > 0 else "worsens" if high < 0 else "does not measurably change"
            say(f"{name}: checkpoint {at + 1} {verdict} the score: {value:+.3f} ({low:+.3f} to {high:+.3f})")
