"""influence demo."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from influence_cli.commands.options import Quiet


def command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A new folder for the project.")] = Path(
        "influence-demo"
    ),
    quiet: Quiet = False,
) -> None:
    """Write a small real project and run the main commands on it.

    The project has 5,000 training and 1,000 test images of Fashion-MNIST and a small CNN, which is trained on the spot.
    500 of the training images are in a wrong class folder. The commands are check, gradients, rank and mislabels.
    Nothing is downloaded.

    Example:

      influence demo my-demo
    """
    from influence_cli.demo.project import write_project
    from influence_cli.runtime.terminal import Terminal

    terminal = Terminal(quiet=quiet)
    with terminal.progress(6000, "writing images") as advance:
        done = 0

        def wrote(now: int, _total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        counts = write_project(folder, progress=wrote)
    terminal.say(
        f"wrote {folder}: {counts['train']:,} training and {counts['test']:,} test images of Fashion-MNIST; "
        f"{counts['moved']:,} training images are in a wrong class folder (truth.csv lists them)"
    )
    os.chdir(folder)
    with terminal.status("loading torch"):
        import torch  # noqa: F401
    _train(terminal)
    app: Any = context.find_root().command
    wrong = _first_misclassified()
    _step(app, terminal, ["check", "--format", "table"])
    _step(app, terminal, ["gradients"])
    _step(app, terminal, ["rank", str(wrong), "--top", "5", "--format", "table", "--report", "rank.html"])
    _step(
        app,
        terminal,
        ["mislabels", "--truth", "truth.csv", "--format", "table", "--report", "mislabels.html"],
    )
    terminal.say("")
    terminal.say(f"The project is in {folder}. Open rank.html and mislabels.html there in a browser. Try next:")
    terminal.say(f"  cd {shlex.quote(str(folder))}")
    terminal.say("  influence mislabels --format jsonl --top 50 | jq -r .path")
    terminal.say("  influence relabel decisions.csv        # decide in mislabels.html, then export decisions.csv")
    terminal.say("  influence rank misclassified --aggregate --report errors.html")
    terminal.say("  influence rank --train $(sed -n 2p truth.csv | cut -d, -f1)")


def _train(terminal: Any) -> None:
    """Train the model of the project with its own training function, as a user would, and save the checkpoint."""
    import torch

    from influence_cli.config.load import load_config
    from influence_cli.data.datasets import load_split
    from influence_cli.model.task import choose_device
    from influence_cli.retrain.training import fresh_model, load_training, train, training_pairs

    config = load_config(Path("influence.yaml"))
    training = load_training(config)
    pairs = training_pairs(load_split(config, "train", config.train))
    model = fresh_model(config, config.seed, choose_device(config.device))
    with terminal.progress(1000, "training the model") as advance:
        done = 0.0

        def trained(now: int, total: int) -> None:
            nonlocal done
            advance(1000 * now / total - done)
            done = 1000 * now / total

        model = train(
            training, model, pairs, l2=config.l2, seed=config.seed, what="the images of the demo", progress=trained
        )
    checkpoint = config.folder / "model.pt"
    torch.save(model.cpu().state_dict(), checkpoint)
    terminal.say(f"trained the model of model.py on these images and saved {checkpoint.name}")


def _first_misclassified() -> int:
    """Find the first test image that the new model gets wrong."""
    from influence_cli.config.load import load_config
    from influence_cli.model.predictions import misclassified
    from influence_cli.model.task import load_tasks
    from influence_cli.runtime.terminal import Terminal

    return int(misclassified(load_tasks(load_config(Path("influence.yaml"))), Terminal(quiet=True))[0])


def _step(app: Any, terminal: Any, words: list[str]) -> None:
    """Run a command in this process. It is shown and recorded as the user would type it."""
    terminal.say("")
    terminal.say(f"$ influence {shlex.join(words)}")
    sys.argv[1:] = words
    # Without standalone mode, the exit code is returned instead of ending the process.
    if code := app(words, standalone_mode=False):
        raise typer.Exit(code)
