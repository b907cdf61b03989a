"""Another network than the run's, for its features: made, loaded and shown the images as its own training did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from influence_cli.checkpoints.load import trained_model
from influence_cli.config.schema import CheckpointConfig, Config, FeaturesConfig
from influence_cli.config.source_code import object_hash
from influence_cli.config.user_code import call, import_object
from influence_cli.data.split import Split
from influence_cli.data.transforms import fixed_steps
from influence_cli.errors import InfluenceError
from influence_cli.model.fingerprint import weights_hash
from influence_cli.model.guard import Guard, add_guard
from influence_cli.runtime.terminal import Terminal


@dataclass(frozen=True)
class Network:
    """Another network, and how it sees the images.

    Attributes:
        name: of its features.
        model: in eval mode, on its device.
        split: the examples, through its transform.
        identity: what its features depend on besides the examples.
        where: the config's line.
    """

    name: str
    model: nn.Module
    split: Split
    identity: dict[str, str]
    where: str


def load_network(
    config: Config, item: FeaturesConfig, where: Callable[..., str], split: Split, terminal: Terminal
) -> Network:
    """Make a network as ``model`` makes one: by its factory, with a checkpoint of any layout.

    Args:
        config: the run's.
        item: of ``evidence.features``.
        where: names the line of its keys.
        split: the examples.
        terminal: told which weights were taken.

    Raises:
        InfluenceError: at the config's line, for what does not exist, fit or load.
    """
    factory = import_object(item.factory, config.folder, where("factory"))

    def build() -> nn.Module:
        model = call(factory, item.args, config.folder, item.factory, where)
        if not isinstance(model, nn.Module):
            raise InfluenceError(
                f"{where('factory')}: {item.factory} returned a {type(model).__name__}, not a torch module"
            )
        return model

    source = item.checkpoint
    if isinstance(source, Path):
        source = CheckpointConfig(file=source)
    model = trained_model(build, source, where("checkpoint"), terminal, section="evidence.features").eval()
    add_guard(model, Guard())
    transform, text = fixed_steps(item.transform or (), config.folder, lambda number: where("transform", number))
    view = replace(split, transform=transform, transform_text=text, where=where())
    identity = {
        "network": f"{item.factory} {object_hash(factory, item.args)}",
        "weights": weights_hash(model),
        "transform": view.transform_text,
    }
    return Network(item.title, model, view, identity, where())
