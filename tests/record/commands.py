"""The fixed list of commands that are recorded.

A line is never changed, so that recordings stay comparable; add new ones. The long groups
are in readme_lines.py and mistakes.py.
"""

# A line of the shell stands on one line here too.
# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mistakes
import readme_lines


@dataclass(frozen=True)
class Command:
    """A line of the shell; with ``terminal`` its stdout is one."""

    line: str
    terminal: bool = False


@dataclass(frozen=True)
class Group:
    """Lines that run one after the other in one folder.

    Attributes:
        name: said in the recording.
        start: the group whose end this begins from; "" is the project as it was made.
        commands: in this order.
        slow: only recorded with ``--slow``.
    """

    name: str
    start: str
    commands: tuple[Command, ...]
    slow: bool = False


def _group(name: str, start: str, lines: str, *, slow: bool = False) -> Group:
    """Make a group of lines of text; a line that begins with ``tty`` has a terminal."""
    texts = [line.strip() for line in lines.strip().splitlines() if line.strip()]
    return Group(
        name, start, tuple(Command(text.removeprefix("tty "), text.startswith("tty ")) for text in texts), slow
    )


NAMES = ("demo", "init", "check", "gradients", "rank", "groups", "mislabels", "relabel", "compare", "verify", "select")
NAMES = (*NAMES, "perturb", "index")
FORMATS = ("table", "jsonl", "json", "csv", "tsv")
METHODS = ("explicit", "ekfac", "kfac", "fisher", "identity")
# On the output layer and with few products: on all layers they take minutes.
SOLVERS = ("arnoldi", "cg", "nystrom", "lissa", "neumann")
FEW = "-s 'gradients.layers=[\"9\"]' -s curvature.max_iterations=5"
SIGNALS = ("combined", "readout", "neighbours", "logistic", "loss", "margin")
SIGNALS = (*SIGNALS, "self-influence", "gradient-norm", "tracin", "test-influence")


def _formats(lines: Sequence[str]) -> str:
    """Write each line in every format, to a terminal, to a pipe and to files."""
    texts = []
    for number, line in enumerate(lines):
        texts += [f"{line} --format {format}" for format in FORMATS]
        texts += [f"tty {line}", line, f"{line} -o rows{number}.parquet", f"{line} -o rows{number}.csv"]
    return "\n".join(texts)


HELP = _group(
    "help",
    "",
    "\n".join(["influence", "influence --help", "influence -h", "tty influence --help", "influence --version"])
    + "\n"
    + "\n".join(f"influence {name} --help" for name in NAMES),
)

# Before there is a store. The last line fills it; other groups begin from here.
STORE = _group(
    "store",
    "",
    """
    influence check
    tty influence check
    influence check -v --full
    influence gradients
    """,
)

README = _group("readme", "store", readme_lines.LINES)

# On the layer that gives the output, where every command takes about a second.
LAYER = _group(
    "layer",
    "",
    """
    printf 'gradients: {layers: ["9"], store: layer.h5, block: 128}\\n' >> influence.yaml
    influence check
    influence gradients -v
    influence mislabels --all -q -o everything.csv
    influence rank 17 --all -q -o one.csv
    influence rank 17 --all -q -o other.csv -s curvature.damping=1
    influence mislabels --signal loss -q -o loss.csv
    """,
)

FORMATTED = _group(
    "formats",
    "layer",
    _formats(
        (
            "influence rank 17 24 --top 3",
            "influence rank --train 300 --top 3",
            "influence mislabels --top 5",
            "influence mislabels --explain 17",
            "influence groups 0:40",
            "influence compare one.csv other.csv --top 5",
            "influence verify 17",
            "influence check",
            "influence perturb 12 --test 17",
        )
    )
    + """
    influence mislabels --all --format fiftyone
    influence mislabels --top 5 --format cleanlab
    influence mislabels --top 5 --format cleanlab -o issues.csv
    influence rank 17 --top 3 -o rows.tsv
    influence rank 17 --top 3 -o rows.json
    influence rank 17 --top 3 -o rows.jsonl
    """,
)

PAGES = _group(
    "pages",
    "layer",
    """
    influence rank 17 misclassified --top 4 --report rank.html
    influence rank 0:20 --aggregate --report aggregate.html --plot aggregate.png
    influence rank 17 --normalise cosine --report cosine.html
    influence rank 17 --damping-sweep --report sweep.html
    influence rank 17 --attribution saliency --report saliency.html
    influence mislabels --report mislabels.html --plot mislabels.svg
    influence mislabels --truth truth.csv --report truth.html --plot truth.svg
    influence mislabels --damping-sweep --signal self-influence --report sweep2.html
    influence mislabels --on test --report test.html
    influence mislabels --signals --top 3 --report signals.html
    influence groups --report groups.html
    influence groups 0:20 --each --metadata everything.csv --by suggested --report each.html
    influence groups --of Shirt --retrain --report retrained.html
    influence compare one.csv other.csv --report compare.html
    influence compare everything.csv loss.csv --report compare2.html
    influence compare one.csv other.csv --distance --top 5 --report distance.html
    influence compare one.csv other.csv --distance --top 5
    influence perturb 12 --test 17 --test 18 --report perturb.html
    influence perturb 12 --test 17 --pixel-step 1/255 --map map.npy
    influence verify 17 --loo 6 --plot loo.svg
    """,
)

VARIANTS = _group(
    "variants",
    "layer",
    "\n".join(
        [f"influence rank 17 --top 2 -s curvature.method={method} -s gradients.store={method}.h5" for method in METHODS]
        + [
            f"influence rank 17 --top 2 -s curvature.method={solver} {FEW} -s gradients.store=few-{solver}.h5"
            for solver in SOLVERS
        ]
        + [f"influence mislabels --top 2 --signal {signal}" for signal in SIGNALS]
        + [f"influence rank 17 --top 2 --normalise {kind}" for kind in ("none", "relatif", "relatif-loss", "cosine")]
    )
    + """
    influence rank 17 -q
    influence rank 17 -v
    influence rank 17 -v --on-the-fly --format csv
    influence mislabels -q
    influence mislabels -v --signals --top 3
    influence check -q
    influence check -v
    influence verify -v
    influence groups -v --top 3
    influence rank 17 -v --top 2 -s curvature.method=lissa -s 'gradients.layers=["9"]' -s curvature.max_iterations=5 -s gradients.store=few-lissa.h5 --strict
    influence rank 17 --top 2 -s curvature.method=cg -s curvature.max_iterations=1 -s gradients.store=short.h5
    influence rank 17 --top 2 -s curvature.method=cg -s curvature.max_iterations=1 -s gradients.store=short.h5 --strict
    influence rank 17 --top 2 -s curvature.matrix=hessian -s curvature.damping=1 -s gradients.store=hessian.h5
    influence rank 17 --top 2 -s gradients.store_dtype=float16 -s gradients.store=half.h5
    influence rank 17 --top 2 -s gradients.store_dtype=int8 -s gradients.store=quarter.h5
    influence rank 17 --top 2 -s train.exclude=exclude.csv
    printf 'index\\n3\\n17\\n' > exclude.csv
    influence rank 17 --top 2 -s train.exclude=exclude.csv -s gradients.store=excluded.h5
    influence rank 17 --target Coat --top 2
    influence rank test/Shirt/05*.png --top 1 --format csv
    printf '17\\n24\\nmisclassified\\n' | influence rank - --top 1
    influence rank 17 --all --format csv | head -3
    influence rank 17 --matrix matrix.h5 -o matrix.csv
    influence mislabels --fail-above 3 -q > /dev/null
    influence mislabels --top auto --format csv
    influence mislabels --pred-probs missing.npy
    INFLUENCE_CONFIG=influence.yaml influence rank 17 --top 1
    INFLUENCE_CONFIG=nowhere.yaml influence rank 17 --top 1
    """,
)

ENSEMBLE = _group(
    "ensemble",
    "layer",
    """
    cp model.pt second.pt
    influence rank 17 --top 2 -s 'model.checkpoint=[model.pt, second.pt]'
    influence mislabels --top 2 -s 'model.checkpoint=[model.pt, second.pt]'
    influence rank 17 --top 2 -s 'model.checkpoint=[model.pt, second.pt]' -s model.ensemble=tracin -s 'model.learning_rates=[0.1, 0.1]' -s 'model.steps=[10, 10]' -s gradients.store=tracin.h5
    influence rank 17 --top 2 -s 'model.checkpoint=[model.pt, second.pt]' -s model.ensemble=source -s 'model.learning_rates=[0.1, 0.1]' -s 'model.steps=[10, 10]' -s gradients.store=source.h5
    influence rank 17 --normalise relatif -s 'model.checkpoint=[model.pt, second.pt]' -s model.ensemble=tracin
    """,
)

GRADIENTS = _group(
    "gradients",
    "layer",
    """
    influence gradients
    influence gradients -v
    influence gradients -q
    influence gradients --fsck
    influence gradients --fsck -v
    influence gradients --compact
    influence gradients -s curvature.damping=0.5
    influence gradients -s seed=1
    influence gradients -s l2=0.1
    influence gradients --overwrite
    python $RECORD/damage.py layer.h5 0.6
    influence rank 17
    influence mislabels --signal self-influence
    influence gradients
    influence gradients --fsck
    influence gradients --repair
    influence gradients --repair
    influence gradients --fsck
    influence rank 17 --top 1
    python $RECORD/damage.py layer.h5 0.0001
    influence rank 17
    influence gradients --fsck
    influence gradients --repair
    influence gradients --overwrite
    head -c 100000 layer.h5 > short.h5 && influence rank 17 -s gradients.store=short.h5
    printf 'no store' > text.h5 && influence rank 17 -s gradients.store=text.h5
    touch train/Bag/03*.png
    influence rank 17
    influence gradients
    influence gradients --overwrite -q
    f=$(ls train/Shirt/*.png | tail -1); cp -p $f kept.png; python $RECORD/damage.py $f 0.5; echo $f
    influence gradients --fsck
    influence gradients --overwrite
    influence gradients
    influence rank 17 --top 1 --skip-unreadable -s gradients.store=skipped.h5
    influence mislabels --top 1 --skip-unreadable
    cp -p kept.png $(ls train/Shirt/*.png | tail -1)
    influence gradients
    influence gradients --fsck
    """,
)

VERIFY = _group(
    "verify",
    "layer",
    """
    influence verify
    influence verify 17 24
    influence verify 17 --loo 4
    influence verify 17 --loo 4 --format csv -o loo.csv --plot loo.png
    influence verify --lds --subsets 3 --repeats 1 --tests 5 -s 'training.args={epochs: 1}'
    influence verify --lds --subsets 3 --repeats 1 --tests 5 -s 'training.args={epochs: 1}' --methods explicit,identity -o lds.csv
    influence verify --lds --subsets 4 --repeats 1 --tests 5 -s 'training.args={epochs: 2}' -q
    influence verify --lds --drop 10% --measure margin --subsets 3 --repeats 1 --tests 5 -s 'training.args={epochs: 1}'
    influence verify --top 2% --tests 2 -s 'training.args={epochs: 1}' --format csv -o top.csv --plot top.png
    influence verify 17 --top 3 --measure margin -s 'training.args={epochs: 1}'
    influence select --keep 0.5
    influence select --keep 0.5
    influence select --keep 0.9 --by loss --exclude kept.csv --format csv
    influence select --keep 0.9 --by random --exclude random.csv -q
    influence select --keep 0.5 --retrain --repeats 1 -s 'training.args={epochs: 1}'
    influence select --keep 0.5 --retrain --repeats 1 -s 'training.args={epochs: 1}' --format table
    influence groups 0:20 --retrain --top 2
    influence perturb 12 --test 17 --retrain
    influence perturb --attack --test 1 --images 1 --rounds 2 --to attack --format table
    influence perturb --attackable --test 0:20 --format csv
    """,
)

# Without the layer alone: what trains the whole network again.
DEEP = _group(
    "deep",
    "store",
    """
    influence verify 17 --loo 2 -s 'training.args={epochs: 1}'
    influence verify --format table
    influence rank --train 300 --format table
    influence groups --report groups.html
    influence mislabels --signals --top 5 --truth truth.csv --format table
    """,
)

INDEX = _group(
    "index",
    "store",
    """
    influence rank 17 --approximate
    influence index
    influence index -v
    influence rank 17 --approximate
    influence rank 17 24 --approximate --top 3 --format table -v
    influence rank 17 --approximate --all
    influence rank 17 --approximate -s curvature.damping=1
    python $RECORD/damage.py influence.h5.index 0.5
    influence rank 17 --approximate
    influence index
    """,
)

RELABEL = _group(
    "relabel",
    "layer",
    """
    influence relabel decisions.csv
    influence relabel decisions.csv
    influence relabel decisions.csv --force -v
    influence mislabels --top 2 -s train.labels=labels.csv -s train.exclude=exclude.csv
    influence rank 17 -s train.labels=labels.csv
    influence relabel decisions.csv --labels other.npy --exclude none.csv --force
    influence relabel decisions.csv --on test
    sed 's/relabel$/drop/;3s/drop$/keep/;4s/drop$/unsure/' decisions.csv > dropped.csv && influence relabel dropped.csv --force
    head -3 decisions.csv > twice.csv; sed -n 3p decisions.csv >> twice.csv; influence relabel twice.csv --force
    sed '2s/^[0-9]*/9999/' decisions.csv > beyond.csv; influence relabel beyond.csv --force
    sed '1s/decision/choice/' decisions.csv > unnamed.csv; influence relabel unnamed.csv --force
    sed '2s/relabel$/maybe/' decisions.csv > maybe.csv; influence relabel maybe.csv --force
    influence relabel decisions.csv --apply-moves --labels labels.csv
    influence relabel decisions.csv --apply-moves
    influence rank 17
    influence mislabels --top 2
    influence relabel decisions.csv --apply-moves
    influence relabel --undo
    influence relabel --undo
    influence relabel dropped.csv --apply-moves
    influence relabel --undo moves.log.csv
    influence rank 17 --top 1
    """,
)

DROPPED = _group(
    "dropped",
    "layer",
    """
    sed -E 's/[^,]*,relabel$/,drop/;3s/,drop$/,keep/;4s/,drop$/,unsure/' decisions.csv > dropped.csv && influence relabel dropped.csv
    influence mislabels --top 2 -s train.exclude=exclude.csv
    influence relabel dropped.csv --apply-moves -v
    influence relabel --undo -v
    influence rank 17 --top 1
    """,
)

INIT = _group(
    "init",
    "",
    """
    influence init new
    influence init new
    influence init
    cd new && influence check
    influence demo .
    """,
)

MISTAKES = _group("mistakes", "layer", mistakes.LINES)

# As a job of two processes: real starts of Python.
JOB = _group(
    "job",
    "layer",
    """
    torchrun --nproc-per-node 2 -m influence_cli gradients -s gradients.store=job.h5
    torchrun --nproc-per-node 2 -m influence_cli rank 17 --top 2 -s gradients.store=job.h5 --format csv
    influence gradients --compact -s gradients.store=job.h5
    """,
)

DEMO = _group("demo", "", "influence demo whole", slow=True)

# What other groups begin from stands before them; otherwise the quick ones come first.
GROUPS = (
    HELP, INIT, LAYER, MISTAKES, RELABEL, DROPPED, FORMATTED, GRADIENTS, PAGES, VARIANTS, ENSEMBLE, VERIFY, STORE,
    INDEX, README, DEEP, JOB, DEMO,
)  # fmt: skip
