"""The run of a recorded loop: its steps and states from the record, and the check that it can be rebuilt from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.recording.facts import LABELS, Facts, read_facts
from influence_cli.recording.passes import floating_buffers, trace_of
from influence_cli.recording.step_files import RECORD_ANEW, StepFiles
from influence_cli.replay.examples import Examples
from influence_cli.replay.record import Record
from influence_cli.runtime import disk
from influence_cli.steps.forward import take_step
from influence_cli.steps.network import TrainedNetwork
from influence_cli.steps.rule import Rule
from influence_cli.steps.run import State, Taken

CHECKED = "checked.json"
# A parameter parts where its rebuilt value is off by this share of the way that it went between two kept states, and of
# rounding in units of the last place. Biases before a BatchNorm do in any case: their gradient is rounding alone. So a
# run parts where such parameters hold a tenth of its numbers.
SAME, LAST_PLACES, FEW = 5e-2, 64, 0.1
# Gradients' norms: at a kept state, where nothing has drifted, they agree to SAME_NORM, and so they do after a step at
# which they agreed to STILL. In between rounding has grown, as in a chaotic run; past DRIFTED no states are compared.
SAME_NORM, STILL, DRIFTED = 5e-3, 1e-4, 1e-2
# How far the traces of two batches of the same inputs may be apart, in units of their root mean square.
SAME_INPUTS = 1e-3
LOOK_AT = (
    "Does the loop train the mean of the config's loss over the batch (no label smoothing, class weights or sum), with "
    "the labels of the config, and was Recorder told of clip=?"
)
OUTSIDE = (
    "What else changes weights, averages or the optimizer's state: an EMA, loaded weights, a projection, passes in "
    "training mode?"
)


@dataclass(frozen=True)
class RecordedRun:
    """The run of a recorded loop, which is a ``Run``.

    Attributes:
        facts: what its steps have in common.
        record: its states.
        files: its steps.
        data: the training examples.
        end: T: the last kept state, which of a training that was cut off is before its last step.
    """

    facts: Facts
    record: Record
    files: StepFiles
    data: Examples
    end: int

    @property
    def examples(self) -> int:
        """Give n."""
        return len(self.data.split)

    @property
    def steps(self) -> int:
        """Give T."""
        return self.end

    @cached_property
    def kept(self) -> Sequence[int]:
        """Give the steps before which a state is kept."""
        return [step for step in self.record.kept if step <= self.end]

    def state(self, step: int) -> State:
        """Give a kept state."""
        return self.record.read(step, self.data.device)

    def taken(self, step: int) -> Taken:
        """Give what a step took."""
        rows = rows_of(self.data.split, self.files.rows(step))
        inputs = self.files.tensor("inputs", step)
        if inputs is None:
            given, labels = self.data.take(rows)
            return Taken(rows, given, labels, self.rule(step))
        given = inputs.to(self.data.device)
        given = given.to(self.data.dtype) if given.is_floating_point() else given
        return Taken(rows, given, self.data.labels[rows].to(self.data.device), self.rule(step))

    def rule(self, step: int) -> Rule:
        """Give the optimiser's step."""
        numbers = self.files.settings(step)
        return Rule(
            self.facts.kind,
            self._per_parameter(numbers.rates),
            numbers.number,
            momentum=numbers.momentum,
            second=numbers.second,
            nesterov=self.facts.nesterov,
            eps=numbers.eps,
            decay=self._per_parameter(numbers.decays),
            clip=self.facts.clip,
        )

    def randomness(self, step: int) -> AbstractContextManager[None]:
        """Put the global generators as they were when the step ran its network."""
        random = self.files.tensor("random", step)
        return nullcontext() if random is None else _generators(random, self.files.tensor("cuda", step), self)

    def _per_parameter(self, numbers: tuple[float, ...]) -> float | Tensor:
        if len({*numbers}) == 1:
            return numbers[0]
        return torch.tensor(numbers, dtype=self.data.dtype, device=self.data.device)[self._groups]

    @cached_property
    def _groups(self) -> Tensor:
        sizes = torch.tensor([int(np.prod(shape)) for _, shape, _ in self.facts.parameters])
        groups = torch.tensor([group for _, _, group in self.facts.parameters])
        return groups.repeat_interleave(sizes).to(self.data.device)


@contextmanager
def _generators(random: Tensor, cuda: Tensor | None, run: RecordedRun) -> Iterator[None]:
    device = run.data.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(random)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda, device)
        yield


def recorded_facts(record: Record, where: str) -> Facts:
    """Read what the steps of a record have in common.

    Args:
        record: its folder.
        where: the config's line.

    Raises:
        InfluenceError: it is no record of a loop.
    """
    described = record.made_of()
    if not described:
        raise InfluenceError(
            f"{where}: {record.shown} holds no record",
            "before the loop: recorder = Recorder(folder, model, optimizer); in it: recorder.step(indices)",
        )
    try:
        return read_facts(described)
    except (KeyError, ValueError, TypeError) as error:
        raise InfluenceError(
            f"{where}: {record.shown} is not the record of a loop",
            "training.record names a folder that influence_cli.Recorder wrote",
        ) from error


def recorded_run(facts: Facts, record: Record, data: Examples) -> RecordedRun:
    """Open a record, and check that it is whole and of this data.

    Raises:
        InfluenceError: steps or states are missing, the run diverged, or the examples are others.
    """
    files = StepFiles(record.folder)
    kept = [step for step in record.kept if step <= files.count]
    end = facts.steps if facts.steps is not None else (kept or [0])[-1]
    for step in {0, end} - {*kept}:
        raise InfluenceError(f"{record.shown}: the state before step {step:,} is missing", RECORD_ANEW)
    if end == 0:
        raise InfluenceError(f"{record.shown} was cut off before its second state", RECORD_ANEW)
    broken = np.flatnonzero(~np.isfinite(files.columns["norm"][:end]))
    if len(broken):
        raise InfluenceError(
            f"{record.shown}: training diverged: the gradient of step {broken[0]:,} of {end:,} is no number",
            "use a smaller rate, a warm-up, or clip the gradient",
        )
    positions = np.unique(files.columns["rows"][: files.ends[end - 1]])
    rows_of(data.split, positions)
    _check_labels(record, data.split, positions)
    return RecordedRun(facts, record, files, data, end)


def rows_of(split: Split, positions: np.ndarray) -> np.ndarray:
    """Give the rows of positions in the data set among the examples in use.

    Raises:
        InfluenceError: a position that the data set does not have, or that is left out.
    """
    if positions.max() >= len(split.labels):
        raise InfluenceError(
            f"{split.where}: the loop trained on example {positions.max():,}, but the data set has "
            f"{len(split.labels):,}",
            "name the data set that was recorded; recorder.step takes positions in it",
        )
    rows = np.searchsorted(split.indices, positions).clip(max=len(split) - 1)
    other = positions[split.indices[rows] != positions]
    if len(other):
        raise InfluenceError(
            f"{split.where}: the loop trained on example {other[0]:,}, which the config leaves out",
            "train.exclude must leave out only what the loop did not see",
        )
    return rows


def _check_labels(record: Record, split: Split, positions: np.ndarray) -> None:
    """Compare the labels that Recorder was given, if it was."""
    path = record.folder / LABELS
    if not path.exists():
        return
    labels = np.load(path, allow_pickle=False)
    if len(labels) != len(split.labels):
        raise InfluenceError(
            f"{split.where}: the loop was recorded with {len(labels):,} labels, but the data set has "
            f"{len(split.labels):,} examples",
            "name the data set that was recorded",
        )
    other = positions[labels[positions] != split.labels[positions]]
    if len(other):
        first = int(other[0])
        raise InfluenceError(
            f"{split.where}: {len(other):,} labels are not those of the recorded loop; the first is that of example "
            f"{first:,}: {labels[first]} there, {split.labels[first]} here",
            "use the labels of the training, or record it again",
        )


def prepare_model(model: nn.Module, facts: Facts, record: Record, first: State) -> None:
    """Let a fresh model of the config train what the loop trained.

    Args:
        model: from the factory.
        facts: of the loop.
        record: for messages.
        first: the first state.

    Raises:
        InfluenceError: the loop's model has other parameters.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, shape, _ in facts.parameters:
        if shapes.get(name) != shape:
            there = f"{list(shapes[name])}" if name in shapes else "missing"
            raise InfluenceError(
                f"{record.shown}: the loop trained {name} {list(shape)}, which is {there} in the config's model",
                "give model.factory the model that was recorded; Recorder takes it without wrappers",
            )
    buffers = sum(value.numel() for value in floating_buffers(model).values())
    unknown = {*facts.still} - {name for name, _ in model.named_modules()}
    if buffers != len(first.buffers) or unknown:
        what = f"has no module {min(unknown)}" if unknown else f"has {buffers:,} numbers in buffers"
        raise InfluenceError(
            f"{record.shown}: the config's model {what}, unlike the loop's (buffers of {len(first.buffers):,} numbers)",
            "give model.factory the model that was recorded",
        )
    trained = {name for name, _, _ in facts.parameters}
    for name, value in model.named_parameters():
        value.requires_grad_(name in trained)


def set_modes(model: nn.Module, facts: Facts) -> None:
    """Put the modules into eval mode that were so while the loop trained."""
    for name in facts.still:
        model.get_submodule(name).training = False


def check_rebuilt(
    network: TrainedNetwork, run: RecordedRun, depends: Mapping[str, str], tell: Callable[[str], None] = lambda _: None
) -> None:
    """Rebuild the whole run once, and compare it with every kept state; what passed is remembered.

    Args:
        network: in training mode.
        run: the record.
        depends: what the result depends on beside the record.
        tell: told before the work begins.

    Raises:
        InfluenceError: the run is another one; it says from which step on, and what to look at.
    """
    key = xxhash.xxh3_64_hexdigest(repr((sorted(depends.items()), run.record.made_of(), run.end)).encode())
    path = run.record.folder / CHECKED
    if path.exists() and path.read_text(encoding="utf-8").strip() == json.dumps(key):
        return
    tell(f"rebuilding the recorded run once, to compare it with its {len(run.kept):,} states (one training); kept")
    for start, stop in zip(run.kept, run.kept[1:], strict=False):
        _check_stretch(network, run, start, stop)
    disk.write_whole(path, json.dumps(key).encode())


def _check_stretch(network: TrainedNetwork, run: RecordedRun, start: int, stop: int) -> None:
    first = state = run.state(start)
    norms, gap, drift = run.files.columns["norm"], 0.0, 0.0
    where = f"{run.record.shown}: rebuilt, the run parts from the record between steps {start:,} and {stop:,}"
    for step in range(start, stop):
        taken = run.taken(step)
        _check_inputs(run, step, taken.inputs)
        with run.randomness(step):
            state, gradient, losses = take_step(network, state, taken)
        if not torch.isfinite(losses).all():
            raise InfluenceError(f"{where}: at step {step:,} it diverges", LOOK_AT)
        _check_precision(network, run, step, state)
        norm, recorded, before = float(gradient.norm()), float(norms[step]), gap
        norm = norm if run.facts.clip is None else min(norm, run.facts.clip)
        gap = abs(norm - recorded) / (recorded + 1e-3 * float(norms[: run.end].max()))
        drift = max(drift, gap)
        if not gap <= SAME_NORM and before < STILL:
            raise InfluenceError(
                f"{where}: at step {step:,} the norm of its gradient is {norm:.4g} instead of {recorded:.4g}",
                LOOK_AT if step == start else f"{LOOK_AT} {OUTSIDE}",
            )
    name = _parting(network, first, state, run.state(stop)) if drift < DRIFTED else None
    if name is not None:
        raise InfluenceError(f"{where} ({name}), and all its gradients agree", OUTSIDE)


def _parting(network: TrainedNetwork, first: State, rebuilt: State, recorded: State) -> str | None:
    """Name what differs most where a rebuilt state is not the recorded one; None where it is."""
    parted: dict[str, float] = {}
    pairs = [(rebuilt.parameters, recorded.parameters, first.parameters)]
    pairs += [(one, other, torch.zeros_like(other)) for one, other in zip(rebuilt.slots, recorded.slots, strict=True)]
    for name in network.names:
        slot = network.slot(name)
        share = max(_apart(one[slot], other[slot], before[slot]) for one, other, before in pairs)
        if not share <= 1:
            parted[name] = share
    numbers = sum(len(recorded.parameters[network.slot(name)]) for name in parted)
    if numbers > FEW * network.size:
        return max(parted, key=lambda name: parted[name])
    # Averages follow the noise of a bias before a BatchNorm, which takes it off again.
    apart = not parted and not _apart(rebuilt.buffers, recorded.buffers, first.buffers) <= 1
    return "the running averages" if apart else None


def _apart(rebuilt: Tensor, recorded: Tensor, before: Tensor) -> float:
    """Give how far two vectors are apart, in units of what they may be."""
    numbers = torch.finfo(recorded.dtype)
    allowed = SAME * float((recorded - before).norm()) + LAST_PLACES * numbers.eps * float(recorded.norm())
    return float((rebuilt - recorded).norm()) / (allowed + numbers.tiny)


def _check_inputs(run: RecordedRun, step: int, inputs: Tensor) -> None:
    """Compare the inputs of a step with what the model was given."""
    size, trace = trace_of(inputs).tolist()
    seen, allowed = run.files.columns, SAME_INPUTS * float(run.files.columns["size"][step])
    if abs(size - seen["size"][step]) <= allowed and abs(trace - seen["trace"][step]) <= allowed:
        return
    if run.files.tensor("inputs", step) is not None:
        raise InfluenceError(
            f"{run.record.shown}: the inputs= of step {step:,} are not what the model was given",
            "recorder.step takes the tensor that goes into the model",
        )
    raise InfluenceError(
        f"{run.record.shown}: the inputs of step {step:,} are not those of the config's examples "
        f"(root mean square {seen['size'][step]:.4g} there, {size:.4g} here)",
        "is train.transform that of the loop? augmented inputs must be recorded: recorder.step(indices, inputs)",
    )


def _check_precision(network: TrainedNetwork, run: RecordedRun, step: int, after: State) -> None:
    """Refuse an Adam whose derivative is no number of the run's precision."""
    lost = run.rule(step).without_derivative(after.slots)
    if not bool(lost.any()):
        return
    name = next(name for name in network.names if bool(lost[network.slot(name)].any()))
    dtype, eps = str(run.data.dtype).removeprefix("torch."), run.rule(step).eps
    raise InfluenceError(
        f"{run.record.shown}: at step {step:,} Adam has no derivative in {dtype} for {int(lost.sum()):,} numbers "
        f"({name}): its eps of {eps:g} is too small for their second moments",
        "train in float64, or with a larger eps; training.recipe has precision: float64 and eps_root",
    )
