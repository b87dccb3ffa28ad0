"""All blocks of a model, one after another, each finished on the disk before the next is begun.

Two streams of hidden states go through the model: the reference's, through the source's weights, and the quantised
one, through what has been made so far. A block is tuned to give the reference's output from the quantised input. Memory
holds one block and a batch; the streams are files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lbq.formats.artifact import DENSE_DTYPE
from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.autoround.blocks import LAYERS, Block, Blocks
from lbq.quantizer.autoround.settings import Tuning
from lbq.quantizer.autoround.tuner import put, rounded, tune
from lbq.quantizer.autoround.work import States, Work
from lbq.quantizer.plan import Plan, Quantize

STREAMS = 3  # files of hidden states that are there at a time, at most
COPIES = 9  # float32 numbers a weight of the block being tuned, as measured: the weight, its rounding, gradients, …


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: told once before anything is done, and after every block."""

    finished: int  # blocks
    blocks: int
    loss: tuple[float, float] | None = None  # of the last block, by round to nearest and as tuned; None: not tuned
    seconds: float | None = None  # that it took; None: nothing is done yet


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Sizes:
    """What a conversion needs beyond the artifact itself, in bytes."""

    memory: int
    disk: int


def sizes(plan: Plan, tuning: Tuning) -> Sizes:
    """From the plan alone; an estimate of memory, and of the disk an upper bound."""
    samples, length = tuning.samples, min(tuning.tokens, plan.spec.context)
    packed = [step for step in plan.steps if isinstance(step, Quantize) and step.module.startswith(LAYERS + ".")]
    blocks: dict[str, int] = {}
    for step in packed:
        number = step.module.split(".")[2]
        blocks[number] = blocks.get(number, 0) + step.entry.n * step.entry.k
    states = samples * length * plan.spec.hidden_size * DENSE_DTYPE.itemsize if tuning.calibrated else 0
    widest = max((p.out_features for p in plan.spec.projections() if p.name.startswith(LAYERS)), default=0)
    batch = min(tuning.batch, samples) * length * (16 * plan.spec.hidden_size + 8 * widest) * 4
    memory = COPIES * 4 * max(blocks.values(), default=0) + (batch if tuning.calibrated else 0)
    disk = STREAMS * states + sum(plan.nbytes for step in packed for plan in step.outputs())
    return Sizes(memory, disk)


class Tuner:
    """The method's weights, for whoever writes the artifact."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        checkpoint: Checkpoint,
        tuning: Tuning,
        tokens: torch.Tensor,
        work: Work,
        device: torch.device,
    ) -> None:
        """``tokens`` is int64 [samples, tokens]; ``work`` is open. Raises DataError as :class:`Blocks` does."""
        self._blocks = Blocks(folder, plan, checkpoint, device)
        self._checkpoint, self._tuning, self._tokens = checkpoint, tuning, tokens
        self._work, self._device = work, device
        self._shape = (*tokens.shape, plan.spec.hidden_size)

    def run(self, on_progress: OnProgress) -> None:
        """Finish every block that is not. Raises DataError for a broken weight or work file, StorageError."""
        first, count = self._resume(), len(self._blocks)
        on_progress(Progress(first, count))
        for number in range(first, count):
            start = time.monotonic()
            loss = self._finish(number)
            on_progress(Progress(number + 1, count, loss, time.monotonic() - start))

    def packed(self, number: int) -> dict[str, PackedWeight]:
        """The finished layers of a block, by module."""
        return self._work.block(number, self._blocks.quantized(number))

    def _resume(self) -> int:
        """The first block that is not finished; its inputs are there afterwards."""
        work, count = self._work, len(self._blocks)
        done = work.numbers("block")
        if done != list(range(len(done))):
            raise DataError(f"{work.folder}: blocks are missing; --restart drops this work")
        if len(done) == count or not self._tuning.calibrated:
            return len(done)
        if not done:
            self._blocks.check()
        first = max(work.numbers("quantized"), default=0)
        if first > len(done) or (first == 0 and done and not work.has("quantized", 0)):
            raise DataError(f"{work.folder}: hidden states are missing; --restart drops this work")
        for number in range(first):
            work.drop("reference", number)
            work.drop("quantized", number)
        if first == 0:
            for kind in ("reference", "quantized"):
                if not work.has(kind, 0) and not work.has(kind, 1):
                    batches = (self._blocks.embedded(part) for part in self._tokens.split(self._tuning.batch))
                    work.write_states(kind, 0, self._shape, batches)
        return first

    def _finish(self, number: int) -> tuple[float, float] | None:
        """Tune one block, or what of it is not done, and pass the streams on.

        Returns mean squared errors of the block's output over the first batch, by round to nearest and as tuned; None
        where there are no samples.
        """
        work, steps = self._work, self._blocks.quantized(number)
        last = number == len(self._blocks) - 1
        block = self._blocks.load(number, self._shape[1])
        if not self._tuning.calibrated:
            work.write_block(number, steps, self._tuned(block, number, [], []))
            return None
        if not work.has("reference", number + 1):
            reference = self._through(block, work.states("reference", number))
            work.write_states("reference", number + 1, self._shape, reference)
        work.drop("reference", number)
        inputs, outputs = work.states("quantized", number), work.states("reference", number + 1)
        if not work.has("block", number):
            work.write_block(number, steps, self._tuned(block, number, inputs, outputs))
        put(block, rounded(self._checkpoint, steps, self._device))
        before = self._loss(block, inputs, outputs)
        put(block, work.block(number, steps))
        after = self._loss(block, inputs, outputs)
        if not last:
            work.write_states("quantized", number + 1, self._shape, self._through(block, inputs))
        else:
            work.drop("reference", number + 1)
        work.drop("quantized", number)
        return before, after

    def _tuned(
        self, block: Block, number: int, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> dict[str, PackedWeight]:
        steps = self._blocks.quantized(number)
        fallback = rounded(self._checkpoint, steps, self._device)
        seed = self._tuning.seed + number  # of the block, not of the run: a resumed run draws the same
        return tune(block, self._blocks.config, steps, fallback, self._tuning, seed, inputs, outputs)

    @torch.no_grad()
    def _through(self, block: Block, states: States) -> Iterator[torch.Tensor]:
        for batch in states.batches(self._tuning.batch):
            yield block(batch.to(self._device)).cpu()

    @torch.no_grad()
    def _loss(self, block: Block, inputs: States, outputs: States) -> float:
        """Over the first batch: it tells how things go, and costs little."""
        given, wanted = next(inputs.batches(self._tuning.batch)), next(outputs.batches(self._tuning.batch))
        return float(torch.nn.functional.mse_loss(block(given.to(self._device)), wanted.to(self._device)))
