"""The fixed list of commands that are recorded.

A line is never changed, so that recordings stay comparable; add new ones. The lines of the README are frozen here as they stood when the list was made.
"""

# A line of the shell stands on one line here too.
# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
METHODS = ("explicit", "ekfac", "kfac", "arnoldi", "fisher", "cg", "nystrom", "lissa", "neumann", "identity")
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

README = _group(
    "readme",
    "store",
    """
    influence rank misclassified --report why.html
    influence mislabels --report labels.html
    influence mislabels --format jsonl --top 50 | jq -r .path
    influence rank misclassified --format csv | head -1
    mkdir bad && cp test/Shirt/050*.png bad/
    ls bad/*.png | influence rank - --format tsv
    influence rank 0:100 --aggregate -o hundred.csv
    influence rank 17 --target predicted --matrix scores.h5 --format json
    influence groups --of Shirt --format csv
    influence mislabels --all -o everything.csv && influence groups --metadata everything.csv --by suggested
    influence rank --train 300 --top 3 | jq -r '[.effect, .test_path, .influence] | @tsv'
    influence mislabels --truth truth.csv --signal loss --top 3 -s curvature.damping=0.01
    influence mislabels --on test --fail-above 500 -q > /dev/null && echo "test labels look sound"
    influence mislabels --top auto -o suspects.csv
    influence mislabels --explain 17 --format csv | grep ^neighbour
    influence rank 17 24 --on-the-fly --format tsv
    influence mislabels --all -o all.parquet
    influence mislabels --all --format cleanlab -o issues.csv
    influence mislabels --truth truth.csv --plot labels.png
    influence mislabels --signal loss -o loss.csv && influence mislabels -o all.csv && influence compare loss.csv all.csv
    influence rank 17 --damping-sweep --format csv > /dev/null
    influence rank 17 --normalise relatif
    influence rank 17 --plot why.svg
    influence rank 17 --attribution integrated-gradients --report pixels.html
    influence mislabels --top 500 --report labels.html
    influence relabel decisions.csv
    influence check -s train.labels=labels.csv -s train.exclude=exclude.csv
    influence select --keep 0.8 --force
    influence perturb 12 --test 17 -s 'gradients.layers=["9"]' --map pixels.png --report perturb.html --retrain
    influence perturb --attackable --test 0:20 --top 5
    influence perturb --attack --test 1 --images 2 --rounds 5 --to attack
    python -c 'from pathlib import Path; from influence_cli import Terminal, find_mislabels, load_config, load_tasks; config, terminal = load_config(Path("influence.yaml")), Terminal(quiet=True); found = find_mislabels(load_tasks(config), config=config, terminal=terminal); print(found.facts.indices[found.order[:50]])'
    """,
)

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
    influence rank 17 -v --top 2 -s curvature.method=lissa -s gradients.store=lissa.h5 --strict
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

MISTAKES = _group(
    "mistakes",
    "layer",
    """
    influence rnak 17
    influence rank
    influence rank 17 --tpo 3
    influence rank 17 --top 0
    influence rank 17 --top many
    influence rank 99999
    influence rank 30:20
    influence rank nowhere.png
    influence rank influence.yaml
    influence rank test
    influence rank 17 --train 3
    influence rank --train 99999
    influence rank 17 --target Shoe
    influence rank 17 --format xml
    influence rank 17 -o nowhere/out.csv
    influence rank 17 --report nowhere/out.html
    influence rank 17 -o out.xml
    influence rank 17 -o same.html --report same.html
    influence rank 17 --format parquet
    influence rank 17 --plot why.bmp
    influence rank 17 --normalise none-such
    influence rank 17 --normalise relatif --damping-sweep
    influence rank 17 --attribution saliency
    influence rank 17 --attribution none-such --report a.html
    influence rank 17 --on-the-fly --damping-sweep
    influence rank --train 3 --aggregate
    influence rank 17 -c missing.yaml
    influence rank 17 -s curvatur.damping=1
    influence rank 17 -s curvature.dampng=1
    influence rank 17 -s curvature.damping=-1
    influence rank 17 -s curvature.damping
    influence rank 17 -s curvature.method=ekfca
    influence rank 17 -s gradients.layers='["77"]'
    influence rank 17 -s model.checkpoint=missing.pt
    influence rank 17 -s model.checkpoint=influence.yaml
    influence rank 17 -s model.factory=./model.py:biuld
    influence rank 17 -s model.factory=torchvision.models.resnet18
    influence rank 17 -s train.dataset=torchvision.datasets.ImagFolder
    influence rank 17 -s 'train.args={rooot: train}'
    influence rank 17 -s 'train.args={root: nowhere}'
    influence rank 17 -s 'train.transform=[ToImgae]'
    influence rank 17 -s 'train.transform=[ToImage]'
    influence rank 17 -s loss=hinge
    influence rank 17 -s loss=crossentropy
    influence rank 17 -s device=cuda:9
    influence rank 17 --precision float8
    influence rank 17 --precision bf16
    printf '17\\nnothing\\n' | influence rank -
    influence rank - < /dev/null
    printf 'l2: [1\\n' > broken.yaml; influence check -c broken.yaml
    printf 'model: 3\\nmodel: 4\\n' > twice.yaml; influence check -c twice.yaml
    printf '' > empty.yaml; influence check -c empty.yaml
    sed 's/l2: 1e-3/l2: lots/' influence.yaml > lots.yaml; influence check -c lots.yaml
    printf 'raise ValueError("no model")\\n' > raising.py; influence check -s model.factory=./raising.py:build
    printf 'def build(:\\n' > syntax.py; influence check -s model.factory=./syntax.py:build
    head -c 500 model.pt > short.pt; influence check -s model.checkpoint=short.pt
    influence mislabels --signal none-such
    influence mislabels --on validation
    influence mislabels --top 0
    influence mislabels --top some
    influence mislabels --explain 99999
    influence mislabels --explain 17 --format cleanlab
    influence mislabels --explain 17 --plot a.png
    influence mislabels --on test --damping-sweep
    influence mislabels --truth missing.csv
    influence mislabels --truth influence.yaml
    influence mislabels --fail-above -1
    printf 'index,label\\n3,Shoe\\n' > wrong.csv; influence mislabels -s train.labels=wrong.csv
    printf 'index\\n99999\\n' > beyond.csv; influence mislabels -s train.exclude=beyond.csv
    influence groups --of Shoe
    influence groups --by suggested
    influence groups --metadata everything.csv --by none_such
    influence groups --metadata missing.csv --by a
    head -20 everything.csv > part.csv; influence groups --metadata part.csv --by suggested
    influence groups --top 0
    influence compare one.csv
    influence compare one.csv missing.csv
    influence compare one.csv everything.csv
    influence compare one.csv influence.yaml
    influence compare one.csv other.csv --report c.html -o c.html
    influence compare everything.csv loss.csv --distance
    influence verify --loo 0
    influence verify --loo 2 --lds
    influence verify 17 --lds
    influence verify 17 --plot a.png
    influence verify --methods ekfac
    influence verify --lds --methods ekfac,ekfac
    influence verify --lds --methods none-such
    influence verify --lds -s training=null
    influence verify --lds -s training.factory=./model.py:trian
    influence select
    influence select --keep 2
    influence select --keep 0.5 --by age
    influence select --keep 0.5 --exclude a.txt
    influence perturb
    influence perturb 12
    influence perturb 99999 --test 17
    influence perturb 12 --test 99999
    influence perturb 12 --test 17 --delta missing.npy
    influence perturb 12 --test 17 --black 0
    influence perturb 12 --test 17 --pixel-step none
    influence perturb --attack --attackable --test 1
    influence perturb --attack --test 1 --to train
    influence perturb 12 --test 17 --map a.txt
    influence gradients --fsck --repair
    influence gradients --format csv
    influence relabel
    influence relabel missing.csv
    influence relabel influence.yaml
    influence relabel --undo
    influence relabel decisions.csv --undo --force
    influence relabel decisions.csv --on validation
    influence init influence.yaml
    """,
)

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
    HELP, INIT, LAYER, MISTAKES, RELABEL, DROPPED, FORMATTED, GRADIENTS, PAGES, VARIANTS, ENSEMBLE, VERIFY, STORE, INDEX, README,
    DEEP, JOB, DEMO,
)  # fmt: skip
