"""The tensors of a plan, made one by one from a checkpoint: rounded to BF16, or quantised block by block of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbq.formats.artifact import DENSE_DTYPE
from lbq.formats.errors import DataError
from lbq.formats.packing import SCALE_DTYPE, PackedWeight, packed_words
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.plan import Keep, Quantize
from lbq.quantizer.rtn import DEFAULT_RULES, UnquantizableWeightError, quantize

CPU_BLOCK = 1 << 21  # weights quantised at a time: float32 temporaries that stay near the caches
GPU_BLOCK = 1 << 26

OnBlock = Callable[[torch.Tensor, PackedWeight], None]  # rows of the source, float32 [rows, K], and what they became


def dense(checkpoint: Checkpoint, step: Keep) -> torch.Tensor:
    """The tensor as BF16. Raises DataError for NaN or infinity, also one that the rounding would make."""
    source = checkpoint.tensor(step.source)
    tensor = source.to(DENSE_DTYPE)
    for number, block in enumerate(tensor.flatten().split(CPU_BLOCK)):
        finite = torch.isfinite(block)
        if not bool(finite.all()):
            at = number * CPU_BLOCK + int((~finite).to(torch.uint8).argmax())
            raise _bad_weight(checkpoint, step.source, at, float(source.flatten()[at]))
    return tensor


def check(checkpoint: Checkpoint, step: Keep | Quantize) -> None:
    """Raise DataError for NaN or infinity in a tensor of the source, also one that the rounding to BF16 would make."""
    dense(checkpoint, Keep("", step.source, ()))


def quantized(
    checkpoint: Checkpoint,
    step: Quantize,
    device: torch.device,
    on_block: OnBlock | None = None,
    to: torch.device | str = "cpu",
) -> PackedWeight:
    """One linear layer, round to nearest on ``device`` by the default rule of its bits; the result lies on ``to``.

    ``on_block`` sees every block of rows as it is made. Raises DataError for a weight that has no code.
    """
    entry = step.entry
    source = checkpoint.tensor(step.source)  # [N, K], mapped
    words = torch.empty((entry.n, packed_words(entry.k, entry.bits)), dtype=torch.int32, device=to)
    scales = torch.empty((entry.n, entry.k // entry.group), dtype=SCALE_DTYPE, device=to)
    rows = max(1, (GPU_BLOCK if device.type == "cuda" else CPU_BLOCK) // entry.k)
    for start in range(0, entry.n, rows):
        block = source[start : start + rows].to(device).float()
        try:
            packed = quantize(block, entry.bits, step.group, DEFAULT_RULES[entry.bits]).regrouped(entry.group)
        except UnquantizableWeightError as error:
            raise _bad_weight(checkpoint, step.source, start * entry.k + error.index, error.value) from None
        words[start : start + rows] = packed.words
        scales[start : start + rows] = packed.scales
        if on_block is not None:
            on_block(block, packed)
    return PackedWeight(words, scales, entry.bits, entry.group, entry.k)


def _bad_weight(checkpoint: Checkpoint, name: str, index: int, value: float) -> DataError:
    place = []
    for extent in reversed(checkpoint.info(name).shape):
        index, position = divmod(index, extent)
        place.append(position)
    return DataError(f"{checkpoint.folder}: {name} has {value} at {place[::-1]}; mend the checkpoint or fetch it again")
