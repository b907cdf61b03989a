"""From a config to what the mathematics needs: model, loss, data, device. The config stops here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.checkpoints.load import trained_model
from influence_cli.config.schema import Config
from influence_cli.config.source_code import UserCode
from influence_cli.config.user_code import call, import_object
from influence_cli.data.batches import ALONE, Batch, Loading, readable_batches
from influence_cli.data.datasets import load_splits
from influence_cli.data.loader_plan import plan_loading
from influence_cli.data.split import Split, refuse_unlabelled
from influence_cli.errors import InfluenceError, near_path
from influence_cli.model.configured_loss import ConfiguredLoss, load_loss
from influence_cli.model.guard import Guard, add_guard
from influence_cli.model.heads import add_head, make_head
from influence_cli.model.losses import may_lack_curvature
from influence_cli.model.matching import match, spread_outputs
from influence_cli.model.measured_loss import LossShape, measure_loss
from influence_cli.model.objective import Objective, example_shares
from influence_cli.model.outputs import Loss, logits_of
from influence_cli.model.sample_weights import weighted
from influence_cli.model.side_files import side_files
from influence_cli.runtime import distributed, work
from influence_cli.runtime.opened_files import noting_opened
from influence_cli.runtime.terminal import Terminal

# Examples whose outputs a loss is measured at.
MEASURED = 8


@dataclass(frozen=True)
class Task:
    """One checkpoint and its data.

    Attributes:
        model: on ``device``, in eval mode.
        loss: (outputs [b, C], targets [b]) to losses [b].
        loss_name: the loss and its arguments, for fingerprints and reports.
        train: training examples.
        test: test examples, or None.
        classes: class names by output number.
        n: number of training examples that the checkpoint was trained on.
        checkpoint: the file or folder of the weights; what the config calls the factory, if that returns them.
        device: where the model is.
        convex_loss: whether the loss is convex in the outputs: known, or measured.
        seed: for everything random here.
        explained: whether predictions and losses of this checkpoint are reported: independent models report their
            mean, a run only its last checkpoint.
        smooth_loss: whether Newton steps in float64 can minimise it, too.
        softmax_loss: whether it reads the outputs as a softmax does.
        curved_loss: whether its slopes lie in the range of its curvature, as those of a cross-entropy do.
        objective: what is minimised, and what the trainer's mean divides by.
        output: ``model.output``, which of the model's outputs the logits are; empty if the config does not say.
        code: the user's code that makes model, loss, examples and transform.
        side_files: files besides the examples that this code reads.
        measured: who reads the data, once ``measure_loading`` has found that out.
        looked: how this checkpoint has been looked at (passes/probe.py): ``known`` or not.
        samples: the examples that were read for that, by the same; all checkpoints share them.
    """

    model: nn.Module
    loss: Loss
    loss_name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    n: int
    checkpoint: Path
    device: torch.device
    convex_loss: bool
    seed: int
    explained: bool = True
    output: str = ""
    code: UserCode = field(default_factory=UserCode, compare=False)
    side_files: tuple[Path, ...] = field(default=(), compare=False)
    smooth_loss: bool = True
    softmax_loss: bool = True
    curved_loss: bool = True
    objective: Objective = field(default_factory=Objective, compare=False)
    measured: list[Loading] = field(default_factory=list, compare=False, repr=False)
    looked: set[bool] = field(default_factory=set, compare=False, repr=False)
    samples: dict[bool, Batch] = field(default_factory=dict, compare=False, repr=False)

    @property
    def loading(self) -> Loading:
        """Give who reads the data: this process alone, unless ``measure_loading`` found that others would help."""
        return self.measured[0] if self.measured else ALONE

    def test_split(self) -> Split:
        """Give the test examples; an error if the config names none."""
        if self.test is None:
            raise InfluenceError("the config has no test data set", "add a section test: {dataset: …, args: {…}}")
        return self.test

    def labelled_tests(self) -> Split:
        """Give the test examples; an error if there are none, or if they have no labels."""
        split = self.test_split()
        refuse_unlabelled(split)
        return split


def load_tasks(config: Config, terminal: Terminal | None = None, *, trained: bool = True) -> list[Task]:
    """Load everything that the config names: one task per checkpoint, the data shared by all of them.

    Args:
        config: the run's config.
        terminal: told what was guessed, what was left out, and which weights of a checkpoint were taken.
        trained: with weights; otherwise as the factory makes the model, for a training to come.

    Raises:
        InfluenceError: at the config's line, for anything that does not exist, fit or load.
    """
    device = choose_device(config.device, config.where("device"))
    torch.manual_seed(config.seed)
    set_precision("float32")
    # The fused attention path of eval mode has no derivative for torch.func.
    torch.backends.mha.set_fastpath_enabled(False)
    train, test = load_splits(config, terminal)
    with noting_opened() as opened:
        configured = load_loss(config)
    code, beside = user_code(config), side_files(config, train, [*train.opened, *opened.files()])
    if isinstance(configured.loss, nn.Module):
        configured.loss.to(device)
    tasks, samples = [], dict[bool, Batch]()
    for number, source in enumerate(config.model.sources):
        where = config.where("model", "checkpoint", number)
        if trained and source is not None:
            _refuse_untrained(config, source.file, where)
        model = trained_model(lambda: build_model(config), source, where, terminal) if trained else build_model(config)
        model.to(device).eval()
        classes, loss = match(model, train, test, configured, config)
        shape = _shape(model, train, configured, loss, device)
        objective = _objective(config, train, configured, shape, terminal if number == 0 else None)
        n = config.train.n if config.train.n is not None else len(train)
        if n < len(train):
            raise InfluenceError(
                f"{config.where('train', 'n')}: train.n is {n}, but the data set has {len(train)} examples in use",
                "n is the size of the set that the checkpoint was trained on; leave it out if that is this whole set",
            )
        explained = not config.model.is_one_run or number + 1 == config.model.count
        output = "" if config.model.output is None else repr(config.model.output)
        # Where the factory gives the weights, it stands for them.
        path = Path(config.model.factory) if source is None else source.file
        by_example = "" if train.weights is None else " by train.weights"
        tasks.append(
            Task(
                model,
                weighted(loss, train, device),
                configured.name + by_example,
                train,
                test,
                classes,
                n,
                path,
                device,
                shape.convex,
                config.seed,
                explained,
                output,
                code,
                beside,
                smooth_loss=shape.smooth,
                softmax_loss=configured.convex is True or shape.weights is not None,
                curved_loss=not may_lack_curvature(loss, configured.name) or shape.weights is not None,
                objective=objective,
                samples=samples,
            )
        )
    work.trials[:] = [_trial(task) for task in tasks]
    return tasks


def _refuse_untrained(config: Config, checkpoint: Path, where: str) -> None:
    """Refuse a checkpoint that a recipe has yet to make."""
    if config.training is not None and config.training.recipe is not None and not checkpoint.exists():
        raise InfluenceError(
            f"{where}: the checkpoint {near_path(checkpoint)} does not exist yet",
            "influence train trains it by training.recipe",
        )


def _trial(task: Task) -> work.Trial:
    """Give a run of model and loss that does not keep the model alive, for naming the example that makes them fail."""
    model, loss, device = weakref.ref(task.model), task.loss, task.device

    def run(inputs: Any, targets: Any) -> None:
        if (network := model()) is not None:
            with torch.no_grad():
                loss(logits_of(network(inputs.to(device))), targets.to(device))

    return run


def user_code(config: Config) -> UserCode:
    """Name the code that makes model, loss, training examples and transform."""
    train, model = config.train, config.model
    steps = [step.name.removesuffix("()") for step in train.transform or ()]
    given = {"model.factory": model.factory, "model.args": model.args, "train.dataset": train.dataset}
    names = (model.factory, config.loss.factory, train.dataset, *steps)
    return UserCode(names, given | {"train.args": train.args}, config.folder)


def _shape(model: nn.Module, train: Split, configured: ConfiguredLoss, loss: Loss, device: torch.device) -> LossShape:
    """Say what is known of the loss, or measure it at random outputs and at those of examples from all over the set."""
    if configured.convex is not None:
        return LossShape(configured.convex, configured.convex and configured.name != "hinge", configured.weights)
    indices, outputs = spread_outputs(model, train, device, MEASURED)
    return measure_loss(loss, outputs, torch.from_numpy(train.labels[indices]))


def _objective(
    config: Config, train: Split, configured: ConfiguredLoss, shape: LossShape, terminal: Terminal | None
) -> Objective:
    """Find what the trainer's mean divides by; the terminal is told where that is not n."""
    labels = train.labels[train.indices]
    shares = example_shares(labels, shape.weights, configured.ignored)
    if train.weights is not None:
        shares = train.weights[train.indices] * (1.0 if shares is None else shares)
    rules = tuple(config.l2.items()) if isinstance(config.l2, dict) else (("*", config.l2),)
    objective = Objective(rules, shares, config.where("l2"))
    if shares is not None and not float(shares.sum()) > 0:
        raise InfluenceError(
            f"{configured.where}: the weights of the training examples add up to {shares.sum():g}",
            "some training example needs a weight above 0",
        )
    if terminal is not None and configured.ignored is not None:
        count = int((labels == configured.ignored).sum())
        terminal.say(f"{count:,} training examples have the ignored label {configured.ignored}: their influence is 0")
    if terminal is not None and shape.weights is not None:
        listed = ", ".join(f"{float(weight):.4g}" for weight in shape.weights[:8])
        terminal.say(
            f"class weights {listed}{', …' if len(shape.weights) > 8 else ''}: the mean divides by their sum over the "
            f"training examples, {objective.factor * len(train):.6g} (n = {len(train):,}), as torch's does; against a "
            f"mean over n that makes l2 {objective.text()}"
        )
    if terminal is not None and train.weights is not None:
        terminal.say(
            f"train.weights: the mean divides by their sum, {objective.factor * len(train):.6g} (n = {len(train):,}); "
            f"{int((train.weights[train.indices] == 0).sum()):,} training examples have the weight 0"
        )
    return objective


def measure_loading(task: Task, terminal: Terminal) -> None:
    """Find out who reads the data of a task, by a measurement of a second at most; further calls do nothing.

    Every pass over the data calls it first: a command that needs no pass measures nothing.

    Args:
        task: whose ``loading`` it decides.
        terminal: told of the plan, warned where loader processes would help but cannot be had.
    """
    if not task.measured:
        task.measured.append(
            plan_loading(task.train, lambda inputs: logits_of(task.model(inputs)), task.device, task.seed, terminal)
        )


def choose_device(name: str, where: str = "device") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that exists here."""
    if name == "auto":
        if torch.cuda.is_available():
            if distributed.size() > 1:  # each process of a job has its own device
                return torch.device("cuda", distributed.local_device(torch.cuda.device_count()))
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and torch.cuda.device_count() <= (int(number) if number.isdigit() else 0):
        raise InfluenceError(
            f"{where}: there is no {name} here ({torch.cuda.device_count()} CUDA devices)", "use device: auto, or cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InfluenceError(f"{where}: there is no mps device here", "use device: auto, or cpu")
    return torch.device(name)


def set_precision(precision: str) -> None:
    """Allow TF32 products on CUDA, or forbid them: torch's default allows them only for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"


def build_model(config: Config) -> nn.Module:
    """Call the model's factory, and have the result give logits of all classes (model/heads.py).

    Raises:
        InfluenceError: at the config's line, if the result is not a model.
    """

    def where(*keys: str) -> str:
        return config.where("model", *(keys or ("factory",)))

    factory = import_object(config.model.factory, config.folder, where())
    model = call(factory, config.model.args, config.folder, config.model.factory, where)
    if not isinstance(model, nn.Module):
        raise InfluenceError(f"{where()}: {config.model.factory} returned a {type(model).__name__}, not a torch module")
    model = _unwrapped(model)
    try:
        add_head(model, make_head(config))
        add_guard(model, Guard())
    except RuntimeError as error:  # torch lets nothing look into a script
        raise InfluenceError(
            f"{where()}: {config.model.factory} returned a TorchScript model, whose layers cannot be watched",
            "return the module that torch.jit.script was given",
        ) from error
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take off what torch.compile and DataParallel put around a model: its layers are watched one by one."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def only_task(tasks: Sequence[Task], what: str) -> Task:
    """Give the one task of a config with one checkpoint.

    Args:
        tasks: a task a checkpoint.
        what: is done with one, such as ``an attack is on one checkpoint``.

    Raises:
        InfluenceError: there are several.
    """
    if len(tasks) > 1:
        raise InfluenceError(f"{what}, but the config lists {len(tasks)}", f"-s model.checkpoint={tasks[0].checkpoint}")
    return tasks[0]


def mean_probabilities(tasks: Sequence[Task], inputs: Tensor) -> Tensor:
    """Run every explained checkpoint forward and average their probabilities: [b, C], on the CPU."""
    total: Tensor | None = None
    tasks = [task for task in tasks if task.explained]
    for task in tasks:
        with torch.no_grad():
            soft = logits_of(task.model(inputs.to(task.device))).softmax(dim=1).cpu()
        total = soft if total is None else total + soft
    if total is None:
        raise ValueError("at least one task is needed")
    return total / len(tasks)


def training_batches(task: Task, *, skip: bool, size: int = 256) -> Iterator[Batch]:
    """Read the training examples once, for the curvature."""
    return readable_batches(task.train, task.train.indices, size, task.loading, skip=skip)
