"""Two lines in a training loop of the user's own, so that its run can be replayed.

    recorder = Recorder("runs/a", model, optimizer)    # before the loop
    recorder.step(indices)                             # once per batch, before optimizer.step()
    recorder.close()                                   # after the loop; or: with Recorder(…) as recorder

``step`` says which examples the batch has. All else is read by hooks, so it does not matter where a loop clips, changes
rates or evaluates: random state and running averages when the model runs, gradients, rates and weights when
``optimizer.step()`` begins.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from influence_cli.errors import InfluenceError
from influence_cli.recording.facts import FACTS, LABELS, Facts
from influence_cli.recording.optimizers import read_optimizer
from influence_cli.recording.passes import Pass, Passes, flat, floating_buffers
from influence_cli.recording.states import kept_states, state_path, stride_after, write_state
from influence_cli.recording.step_files import Step, write_steps
from influence_cli.runtime import disk

Indices: TypeAlias = Tensor | np.ndarray | Sequence[int]
# Bytes of inputs that wait in memory before a file of steps is written.
WAITING = 2**26
# How far above ``clip`` a clipped gradient's norm may be, by rounding.
CLIP_SLACK = 1e-3


class Recorder:
    """Writes down a training while it runs: order, rates, random states, and about √T of its T states.

    Args:
        folder: where to; it must not hold a record yet.
        model: the module that the loop calls.
        optimizer: torch's SGD, Adam or AdamW.
        clip: the largest norm, if the loop calls ``clip_grad_norm_`` on all trained parameters.
        labels: int [n], of the training examples by position; they are compared with the config's.
        overwrite: replaces a record that is there.

    Raises:
        InfluenceError: a replay cannot follow this training; it says what.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
        labels: Indices | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        _refuse_wrapped(model)
        self._reader = read_optimizer(model, optimizer)
        if clip is not None and not clip > 0:
            raise InfluenceError(f"clip is {clip}: expected a number above 0", "leave it out where nothing is clipped")
        if (self.folder / FACTS).exists():
            if not overwrite:
                raise InfluenceError(f"{self.folder} holds a record already", "overwrite=True replaces it")
            disk.remove_tree(self.folder)
        disk.make_folder(self.folder)
        if labels is not None:
            content = io.BytesIO()
            np.save(content, _positions(labels, "labels"))
            disk.write_whole(self.folder / LABELS, content.getvalue())
        self._clip = clip
        self._model, self._passes = model, Passes(model)
        self._facts: Facts | None = None
        self._given: tuple[np.ndarray, Tensor | None] | None = None
        self._waiting: list[tuple[Step, Tensor]] = []
        self._steps, self._diverged = 0, False
        self._hooks = [
            model.register_forward_pre_hook(self._passes.before, with_kwargs=True),
            model.register_forward_hook(self._passes.after),
            optimizer.register_step_pre_hook(self._before_step),
        ]

    @property
    def steps(self) -> int:
        """Count the steps that were recorded."""
        return self._steps

    def step(self, indices: Indices, inputs: Tensor | None = None) -> None:
        """Say what the batch of the coming ``optimizer.step()`` is.

        Args:
            indices: [b], the positions of its examples in the data set that the config names.
            inputs: [b, …] as the model got them, where they are augmented; they are kept as they are. Without them a
                replay takes those that ``train.transform`` gives.

        Raises:
            InfluenceError: the batch before this one was not followed by ``optimizer.step()``.
        """
        if not self._hooks:
            raise InfluenceError("recorder.step() was called after recorder.close()", "close it after the loop")
        if self._given is not None:
            raise InfluenceError(
                f"step {self._steps:,}: recorder.step() was called twice without optimizer.step() between them",
                "a replay follows one batch per step: no gradient accumulation, no GradScaler that leaves steps out",
            )
        rows = _positions(indices, "indices")
        if inputs is not None and len(inputs) != len(rows):
            raise InfluenceError(f"step {self._steps:,}: {len(rows)} indices, but inputs of {len(inputs)} examples")
        self._given = rows, None if inputs is None else inputs.detach().cpu().clone()

    def close(self) -> None:
        """Keep the last state, and take the hooks away; further calls do nothing."""
        if not self._hooks:
            return
        self._release()
        if self._facts is None:
            raise InfluenceError(f"{self.folder}: no step was recorded", "call recorder.step(indices) in the loop")
        self._flush()
        first = next(iter(self._reader.parameters.values()))
        self._keep(flat(floating_buffers(self._model).values(), first))
        replace(self._facts, steps=self._steps).write(self.folder)

    def __enter__(self) -> Recorder:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it; after an exception the record ends with its last kept state."""
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_step(self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write down a step that begins now."""
        given, seen = self._given, self._checked_pass(args, kwargs)
        assert given is not None
        rows, inputs = given
        if seen.batch != len(rows):
            raise InfluenceError(
                f"step {self._steps:,}: {len(rows)} indices, but the model was given {seen.batch} examples",
                "recorder.step takes the indices of the whole batch",
            )
        settings, norm = self._reader.settings(self._steps), self._reader.gradient_norm(self._steps)
        if self._facts is None:
            self._facts = self._begin(seen)
        if seen.buffers is not None:
            self._flush()
            self._keep(seen.buffers)
        elif sum(_bytes(step) for step, _ in self._waiting) > WAITING:
            self._flush()
        random, cuda = (seen.random, seen.cuda) if self._passes.draws else (None, None)
        numbers = torch.stack([norm.detach().double(), *seen.trace.double()])
        self._waiting.append((Step(rows, settings, 0.0, (0.0, 0.0), random, cuda, inputs), numbers))
        self._steps += 1
        self._given = None
        self._passes.forget()
        self._passes.wanted = self._steps % stride_after(self._steps) == 0

    def _checked_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Give the pass whose gradient the step takes."""
        step, seen = self._steps, self._passes.last
        if any(callable(each) for each in (*args[1:], *kwargs.values())):
            raise InfluenceError("optimizer.step(closure) cannot be recorded", "call optimizer.step() without one")
        if self._given is None:
            raise InfluenceError(
                f"step {step:,}: optimizer.step() without recorder.step(indices) before it", "call it once per batch"
            )
        if seen is None:
            raise InfluenceError(
                f"step {step:,}: the model that Recorder was given did not run",
                "give it the module that the loop calls",
            )
        if self._passes.counts[seen.still] > 1:
            raise InfluenceError(
                f"step {step:,}: the model ran {self._passes.counts[seen.still]} times before optimizer.step()",
                "a replay follows one batch per step: no gradient accumulation; evaluate under torch.no_grad()",
            )
        if self._facts is not None and seen.still != self._facts.still:
            changed = next(iter({*seen.still} ^ {*self._facts.still}))
            raise InfluenceError(
                f"step {step:,}: {changed or 'the model'} changed between training and eval mode",
                "a replay follows one mode for each module: call model.train() before every epoch",
            )
        return seen

    def _begin(self, seen: Pass) -> Facts:
        reader = self._reader
        parameters = tuple(
            (name, tuple(value.shape), group)
            for (name, value), group in zip(reader.parameters.items(), reader.groups, strict=True)
        )
        facts = Facts(reader.kind, reader.nesterov, self._clip, parameters, seen.still)
        facts.write(self.folder)
        return facts

    def _keep(self, buffers: Tensor) -> None:
        """Keep the state before the next step, and drop those that the schedule no longer has."""
        write_state(self.folder, self._steps, {**self._reader.vectors(), "buffers": buffers})
        stride = stride_after(self._steps)
        if self._steps == stride * stride:
            for step in kept_states(self.folder):
                if step % stride:
                    disk.remove(state_path(self.folder, step))

    def _flush(self) -> None:
        """Write the steps that wait; of a GPU their numbers are read only now."""
        if not self._waiting:
            return
        first = self._steps - len(self._waiting)
        table = torch.stack([numbers for _, numbers in self._waiting]).tolist()
        for number, (norm, _, _) in enumerate(table):
            if self._clip is not None and norm > self._clip * (1 + CLIP_SLACK):
                raise InfluenceError(
                    f"step {first + number:,}: the gradient has norm {norm:.4g}, above clip={self._clip:g}",
                    f"call clip_grad_norm_(model.parameters(), {self._clip:g}) before optimizer.step()",
                )
            if not np.isfinite(norm) and not self._diverged:
                self._diverged = True
                warnings.warn(f"training diverged: the gradient of step {first + number:,} is no number", stacklevel=2)
        steps = [
            replace(step, norm=norm, trace=(size, trace))
            for (step, _), (norm, size, trace) in zip(self._waiting, table, strict=True)
        ]
        write_steps(self.folder, first, steps)
        self._waiting = []


def _positions(given: Indices, name: str) -> np.ndarray:
    array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise InfluenceError(f"{name} has the shape {list(array.shape)} and type {array.dtype}", "whole numbers [b]")
    if name == "indices" and array.min() < 0:
        raise InfluenceError(f"{name} has {array.min()}: positions in the data set begin at 0")
    return array.astype(np.int64)


def _bytes(step: Step) -> int:
    return 0 if step.inputs is None else step.inputs.numel() * step.inputs.element_size()


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise InfluenceError(
            "a training in several processes or replicas cannot be recorded", "record it on one device"
        )
    if hasattr(model, "_orig_mod"):
        raise InfluenceError("a compiled model cannot be recorded", "record the training without torch.compile")
