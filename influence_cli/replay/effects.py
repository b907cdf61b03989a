"""Influence from a run: the derivatives of test losses in the training examples, kept once they are computed."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from influence_cli.model.losses import negative_margin
from influence_cli.precompute.prepared import RunSummary
from influence_cli.replay.open import Replayed
from influence_cli.replay.outcomes import BATCH, changes_of, losses_of
from influence_cli.replay.verdict import Verdict
from influence_cli.runtime import disk, distributed
from influence_cli.runtime.memory import available_bytes
from influence_cli.runtime.terminal import Advance
from influence_cli.steps.backward import replay, replay_inputs
from influence_cli.steps.forward import WithImage, follow_weights, run_again
from influence_cli.steps.run import State

# Measures that go back through the run at once, and the share of the free memory for their vectors.
BLOCK, FREE_SHARE = 64, 0.25


@dataclass(frozen=True)
class RunEffects:
    """The influence that a run gives; it is an ``Effects``.

    Attributes:
        replayed: the run.
        verdict: how far its numbers can be trusted; None where that is not measured.
    """

    replayed: Replayed
    verdict: Verdict | None

    @property
    def summary(self) -> RunSummary:
        """Give what is known of the run."""
        steps = self.replayed.run.steps
        if self.verdict is None:
            return RunSummary(steps, None, None, "")
        return RunSummary(steps, self.verdict.agreement, self.verdict.slope, self.verdict.sentence())

    @cached_property
    def last(self) -> State:
        """Give the last state."""
        return self.replayed.run.state(self.replayed.run.steps)

    def on_margins(self) -> RunEffects:
        """Give the same of margins with their sign changed; they are kept under another name."""
        task = replace(self.replayed.task, loss=negative_margin, loss_name="margin")
        return replace(self, replayed=replace(self.replayed, task=task))

    def slopes(self, inputs: Tensor, targets: Tensor, advance: Advance) -> np.ndarray:
        """Give the derivatives of the losses of test examples in the weights of the training examples [m, n].

        What is kept is read. The others go back through the run in blocks, and the processes of a job share them.
        """
        keys = [self._key("loss", inputs[at : at + 1], targets[at : at + 1]) for at in range(len(targets))]
        missing = np.array([at for at, key in enumerate(keys) if not self._path(key).exists()], dtype=np.int64)
        advance(len(keys) - len(missing))
        missing = np.array(distributed.from_first(missing.tolist), dtype=np.int64)
        mine = missing[distributed.share(len(missing))]
        for block in np.array_split(mine, max(1, -(-len(mine) // self._block()))) if len(mine) else []:
            end = self._ends(inputs[block], targets[block])
            for at, row in zip(block, self._replay(end, len(block), advance), strict=True):
                self._write(keys[at], row)
        distributed.barrier()
        return np.stack([self._read(key) for key in keys])

    def mean_slopes(self, inputs: Tensor, targets: Tensor, advance: Advance) -> np.ndarray:
        """Give the derivatives of the mean loss of test examples [n]: one replay, however many they are."""
        key = self._key("mean", inputs, targets)
        if distributed.from_first(lambda: not self._path(key).exists()) and distributed.is_first():
            parts = zip(torch.split(inputs, BATCH), torch.split(targets, BATCH), strict=True)
            sums = [self._gradient(x, y) for x, y in parts]
            mean = self._at_end(
                torch.stack([parameters for parameters, _ in sums]).sum(dim=0, keepdim=True) / len(targets),
                torch.stack([buffers for _, buffers in sums]).sum(dim=0, keepdim=True) / len(targets),
            )
            self._write(key, self._replay(mean, 1, advance)[0])
        distributed.barrier()
        return self._read(key)

    def slopes_of(self, row: int, inputs: Tensor, targets: Tensor) -> np.ndarray:
        """Give the derivatives of the losses of test examples in the weight of one training example [m].

        The example is followed forwards through the run, so all test examples together cost one pass.
        """
        run, network = self.replayed.run, self.replayed.network
        weights = np.zeros((1, run.examples))
        weights[0, row] = 1
        last, moved = follow_weights(network, run, weights)
        changes = changes_of(self.replayed.task, network, last, moved, inputs, targets)
        return np.asarray(changes[0])

    def takes_as_it_is(self, row: int, image: Tensor) -> bool:
        """Say whether every step that takes a training image takes these very numbers: no other, none augmented."""
        run = self.replayed.run
        for step in range(run.steps):
            taken = run.taken(step)
            for place in np.flatnonzero(taken.rows == row):
                seen = taken.inputs[place]
                if seen.shape != image.shape or not torch.equal(seen.to(image), image):
                    return False
        return True

    def image_slopes(
        self, row: int, inputs: Tensor, targets: Tensor, advance: Advance
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give the derivatives of the losses of test examples in the weight of a training image, and in its numbers."""
        run, size = self.replayed.run, self._block()
        weights, slopes = [], []
        for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            share = len(y) / run.steps
            weight, slope = replay_inputs(
                self.replayed.network, run, self._ends(x, y), row, partial(_in_shares, advance, share)
            )
            weights.append(weight)
            slopes.append(slope)
        return np.concatenate(weights), np.concatenate(slopes)

    def rises_with(self, row: int, image: Tensor, inputs: Tensor, targets: Tensor, advance: Advance) -> np.ndarray:
        """Train again with another image in the place of a training image: the rise of the losses [m] that happens."""
        run, network = self.replayed.run, self.replayed.network
        changed = WithImage(run, row, image)
        again = run_again(network, changed, np.ones(run.examples), lambda steps: advance(steps / run.steps))
        after, before = (losses_of(self.replayed.task, network, state, inputs, targets) for state in (again, self.last))
        return np.asarray(after - before)

    def _replay(self, end: State, tests: int, advance: Advance) -> np.ndarray:
        run = self.replayed.run
        return replay(self.replayed.network, run, end, partial(_in_shares, advance, tests / run.steps))

    def _ends(self, inputs: Tensor, targets: Tensor) -> State:
        """Give the derivatives of losses in the last state."""
        rows = [self._gradient(x[None], y[None]) for x, y in zip(inputs, targets, strict=True)]
        return self._at_end(torch.stack([row for row, _ in rows]), torch.stack([row for _, row in rows]))

    def _at_end(self, parameters: Tensor, buffers: Tensor) -> State:
        """Give derivatives [K, p] and [K, q] as those of the last state: no loss depends on the optimiser's slots."""
        return State(parameters, tuple(torch.zeros_like(parameters) for _ in self.last.slots), buffers)

    def _gradient(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gradient of a summed loss at the last state, in the parameters [p] and in the buffers [q]."""
        task, network, last = self.replayed.task, self.replayed.network, self.last
        parameters = last.parameters.detach().clone().requires_grad_()
        buffers = last.buffers.detach().clone().requires_grad_()
        with torch.enable_grad():
            outputs = network.measure(parameters, buffers, inputs.to(last.parameters))
            loss = task.loss(outputs, targets.to(task.device)).sum()
            by_parameters, by_buffers = torch.autograd.grad(
                loss, (parameters, buffers), allow_unused=True, materialize_grads=True
            )
        return by_parameters, by_buffers

    def _block(self) -> int:
        """Bound the measures of a block by the memory for their vectors: parameters, slots, gradient and product."""
        each = self.last.parameters.element_size() * self.replayed.network.size * 2 * (3 + len(self.last.slots))
        each += 8 * self.replayed.run.examples
        free = available_bytes(self.replayed.task.device)
        return max(1, min(BLOCK, int(FREE_SHARE * free / each)))

    def _key(self, measure: str, inputs: Tensor, targets: Tensor) -> str:
        state = xxhash.xxh3_128(f"{measure} {self.replayed.task.loss_name} {inputs.shape}".encode())
        state.update(inputs.contiguous().cpu().numpy().tobytes())
        state.update(targets.cpu().numpy().tobytes())
        return state.hexdigest()

    def _path(self, key: str) -> Path:
        return self.replayed.record.folder / "replays" / f"{key}.npy"

    def _read(self, key: str) -> np.ndarray:
        values: np.ndarray = np.load(self._path(key), allow_pickle=False)
        return values

    def _write(self, key: str, slopes: np.ndarray) -> None:
        path, content = self._path(key), io.BytesIO()
        np.save(content, slopes)
        disk.make_folder(path.parent)
        disk.write_whole(path, content.getvalue())


def _in_shares(advance: Advance, share: float, steps: int) -> None:
    advance(steps * share)
