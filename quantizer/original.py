"""A checkpoint's weights as they are, each as the BF16 that a conversion would keep: what artifacts are compared with.

Names, shapes, ties and casts are decided by the planner of conversions, so that the original is that of every artifact
made from the same checkpoint. F16 and F32 sources are rounded to BF16.
"""

from __future__ import annotations

from types import TracebackType

import torch

from lbq.formats.artifact import DENSE_DTYPE
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.families import read_spec
from lbq.quantizer.plan import Keep, Plan, keep_all
from lbq.quantizer.prepare import head_differs
from lbq.quantizer.source import SourceFolder, open_weights


class Original:
    """An opened checkpoint, in the form in which a runtime takes weights. BF16 tensors are views of mapped files."""

    def __init__(self, source: SourceFolder, checkpoint: Checkpoint, plan: Plan) -> None:
        self.folder = source.folder
        self.spec = plan.spec
        self.notes = plan.notes
        self._checkpoint = checkpoint
        self._sources = {step.name: step.source for step in plan.steps if isinstance(step, Keep)}

    def is_quantized(self, module: str) -> bool:
        """False for every linear layer."""
        del module
        return False

    def packed(self, module: str) -> PackedWeight:
        """There are no codes."""
        raise AssertionError(f"{module} is not quantized")

    def dense(self, name: str) -> torch.Tensor:
        """A tensor by its full name, as BF16."""
        return self._checkpoint.tensor(self._sources[name]).to(DENSE_DTYPE)

    def release(self, module: str) -> None:
        """There are no codes."""
        raise AssertionError(f"{module} is not quantized")

    def release_dense(self, name: str) -> None:
        """Drop the resident pages of a tensor that has been copied elsewhere."""
        self._checkpoint.release(self._sources[name])

    def close(self) -> None:
        """Unmap what nobody uses any more."""
        self._checkpoint.close()

    def __enter__(self) -> Original:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_original(source: SourceFolder) -> Original:
    """Open a checkpoint; reads its config and headers.

    Raises DataError and StorageError as a conversion of it would.
    """
    adapted = read_spec(source.folder)
    checkpoint = open_weights(source)
    try:
        plan = keep_all(adapted.spec, checkpoint, head_differs(adapted.spec, checkpoint))
    except BaseException:
        checkpoint.close()
        raise
    return Original(source, checkpoint, plan)
