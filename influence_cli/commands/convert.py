"""influence convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence_cli.commands.options import Quiet


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A whole pickled model, TorchScript or torch.export.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.safetensors", help="Where to write the weights.")
    ],
    trust: Annotated[
        bool, typer.Option("--trust", help="Run what FILE holds, with your rights. Only for a file that you trust.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the weights of a whole pickled model to a file that any command reads.

    No other command runs what a checkpoint holds. A whole model (torch.save(model, FILE), TorchScript, torch.export)
    can only be read by running it. With --trust this happens once, in a process of its own, in the current folder,
    where the model's classes are looked for too.

    Examples:

      influence convert best.pt -o best.safetensors --trust
    """
    from influence_cli.errors import InfluenceError, counted, human_bytes, typed_path
    from influence_cli.runtime.outputs import check_output, refuse_clashes
    from influence_cli.runtime.terminal import Terminal

    terminal = Terminal(quiet=quiet)
    if not file.is_file():
        raise InfluenceError(f"{file} is {'a folder' if file.is_dir() else 'not there'}", "name the file of a model")
    if output.suffix != ".safetensors":
        raise InfluenceError(f"-o {output}: the weights are written as .safetensors", f"-o {file.stem}.safetensors")
    refuse_clashes([(file, "FILE")], None, [(output, "the file of -o")])
    check_output(output)
    if not trust:
        raise InfluenceError(
            f"{file} can only be converted by running the code that it holds, which could do anything that you can",
            "if you know who made it: the same command with --trust",
        )
    from influence_cli.checkpoints.convert import convert

    with terminal.status(f"running {file.name} in a process of its own"):
        made = convert(file, output)
    terminal.say(f"wrote {output} ({counted(made.tensors, 'tensor')}, {human_bytes(made.size)}) from {made.source}")
    if made.others:
        terminal.say(f"{file.name} holds other models too, which were not written: {', '.join(made.others)}")
    terminal.say(f"next: model.checkpoint: {typed_path(output)}")
