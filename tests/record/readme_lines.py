"""The lines of the README that apply to the demo, frozen as they stood when the list was made."""

# A line of the shell stands on one line here too.
# ruff: noqa: E501
LINES = """
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
    python -c 'from inspect import signature; from pathlib import Path; from influence_cli import Terminal, find_mislabels, load_config, load_tasks; config, terminal = load_config(Path("influence.yaml")), Terminal(quiet=True); needs = {"config": config, "terminal": terminal}; found = find_mislabels(load_tasks(config), **{name: needs[name] for name in needs if name in signature(find_mislabels).parameters}); print(found.facts.indices[found.order[:50]])'
"""
