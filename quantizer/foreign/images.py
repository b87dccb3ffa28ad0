"""What becomes of another tool's layers: their exact images, or what they are requantised to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lbq.formats.artifact import DENSE_DTYPE
from lbq.formats.errors import UsageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import BITS, SCALE_DTYPE, PackedWeight, packed_words
from lbq.formats.scheme import Scheme, effective_group
from lbq.formats.spec import Projection
from lbq.formats.wording import counted, pattern
from lbq.quantizer import tensors
from lbq.quantizer.foreign.checkpoint import ForeignCheckpoint
from lbq.quantizer.foreign.coded import BLOCK, Coded, NoImage, stored_group
from lbq.quantizer.plan import Keep, Quantize
from lbq.quantizer.request import scheme
from lbq.quantizer.rtn import quantize
from lbq.quantizer.tensors import OnBlock

WHOLE = 16  # bits of a part that the source does not quantise
SCALES_ROUNDED = "scales that BF16 does not hold are rounded to it, by at most 0.2%; codes are the source's"


@dataclass(frozen=True)
class Wish:
    """Bits and group of a unit, a row by its word; None: the source's."""

    bits: int | None
    group: int | str | None


class Images:
    """The quantised layers of an import, unit by unit; afterwards the weights of the artifact.

    ``entries`` are the layers that become codes, ``notes`` what differs from the source. A layer is stored as its exact
    image; where it has none and may be requantised, with its own codes and rounded scales; else rounded to nearest.
    """

    def __init__(self, foreign: ForeignCheckpoint, *, requantize: bool) -> None:
        self.entries: dict[str, QuantizedModule] = {}
        self.rounded_bits: set[int] = set()  # widths of layers that were rounded to nearest
        self._foreign, self._requantize = foreign, requantize
        self._scales: set[str] = set()  # layers with rounded scales
        self._nearest: set[str] = set()  # layers rounded to nearest
        self._said: Counter[str] = Counter()  # by what there is to say: layers
        self._refused: Counter[str] = Counter()  # likewise, of what has no image
        self._wider: int | None = None  # bits at which the first layer that is refused would have an image

    def choose(self, unit: Sequence[Projection], wish: Wish) -> None:
        """Decide on a fused unit. Reads its codes. Nothing where the source quantises no part of it, unless ``wish``
        has bits and it is a layer by itself."""
        layers = [self._foreign.layers[name] for p in unit if (name := self._stored(p.name)) is not None]
        if not layers and (len(unit) > 1 or wish.bits is None):
            return
        names = " and ".join(p.name.rpartition(".")[2] for p in unit)
        k = unit[0].in_features
        own = [layer.setting.bits for layer in layers] + [WHOLE] * (len(unit) - len(layers))
        bits = wish.bits or min((b for b in BITS if b >= max(own[: len(layers)])), default=max(BITS))
        found = [stored_group(layer.setting.group_in(k), k) for layer in layers]
        group = _group(found, k, bits, wish.group)
        if len(layers) < len(unit) and len(unit) > 1:
            self._refuse(f"{names} are fused, and only a part of them is quantized", len(unit))
        elif any(b < bits for b in own) and wish.bits is None:
            self._said[f"{names}: codes of {min(own)} bits are stored in {bits}, with the same values"] += len(unit)
        for p in unit:
            self.entries[p.name] = QuantizedModule(p.out_features, p.in_features, bits, group)
            self._decide(p)

    def check(self, name: str) -> None:
        """Raise UsageError if a layer has no image and may not be requantised."""
        if not self._refused or self._requantize:
            return
        reasons = "; ".join(f"{what} ({counted(count, 'layer')})" for what, count in self._refused.most_common())
        exact = f"--bits {self._wider} holds the same values in more space, " if self._wider else ""
        raise UsageError(
            f"{name}: no exact image in lbq's format: {reasons}; {exact}--requantize makes one that differs, and says "
            "by how much; or convert the original BF16 weights"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say, each with its number of layers."""
        return tuple(f"{what} ({counted(count, 'layer')})" for what, count in self._said.items())

    @property
    def requantized(self) -> int:
        """Layers whose weights are not the source's."""
        return len(self._scales | self._nearest)

    def most_common(self) -> Scheme:
        """Of all layers that become codes."""
        return Counter(entry.scheme for entry in self.entries.values()).most_common(1)[0][0]

    def packed(self, step: Quantize, on_block: OnBlock) -> PackedWeight:
        """See :class:`lbq.quantizer.methods.Weights`: against what the source's codes stand for."""
        entry, module = step.entry, step.module
        stored = self._stored(module)
        if stored is None:
            return tensors.quantized(self._foreign.checkpoint, step, torch.device("cpu"), on_block)
        words = torch.empty((entry.n, packed_words(entry.k, entry.bits)), dtype=torch.int32)
        scales = torch.empty((entry.n, entry.k // entry.group), dtype=SCALE_DTYPE)
        start = 0
        for part in _blocks(self._foreign.coded(stored)):
            source = part.dequantize()
            packed = self._image(module, part, source)
            stop = start + packed.n
            words[start:stop], scales[start:stop] = packed.words, packed.scales
            on_block(source, packed)
            start = stop
        self._foreign.release_dense(f"{stored}.weight")
        return PackedWeight(words, scales, entry.bits, entry.group, entry.k)

    def dense(self, step: Keep) -> torch.Tensor:
        """See :class:`lbq.quantizer.methods.Weights`."""
        if step.name.removesuffix(".weight") in self._foreign.layers:
            return self._foreign.dense(step.name).to(DENSE_DTYPE)
        return tensors.dense(self._foreign.checkpoint, step)

    def finish(self) -> None:
        """There is nothing to tidy."""

    def _stored(self, module: str) -> str | None:
        """The source's layer with a module's codes: itself, or the embedding for a tied head. None: it is dense."""
        spec = self._foreign.spec
        name = spec.embedding if spec.tied and module == spec.head.name else module
        return name if name in self._foreign.layers else None

    def _decide(self, p: Projection) -> None:
        """How a layer is made: by reading it."""
        entry = self.entries[p.name]
        group = "one scale a row" if entry.scheme.group is None else f"groups of {entry.group}"
        nearest = f"rounded to nearest at {entry.bits} bits, {group}"
        stored = self._stored(p.name)
        if stored is None:
            self._said[f"{pattern(p.name)}: {nearest}"] += 1
            self._nearest.add(p.name)
            self.rounded_bits.add(entry.bits)
            return
        coded = self._foreign.coded(stored)
        reason = _obstacle(coded, entry.bits, entry.group)
        if reason is None:
            return
        self._refuse(reason, 1, coded, entry)
        if _obstacle(coded, entry.bits, entry.group, round_scales=True) is None:
            self._said[SCALES_ROUNDED] += 1
            self._scales.add(p.name)
        else:
            self._said[f"{reason}: {nearest}"] += 1
            self._nearest.add(p.name)
            self.rounded_bits.add(entry.bits)

    def _refuse(
        self, reason: str, count: int, coded: Coded | None = None, entry: QuantizedModule | None = None
    ) -> None:
        if not self._refused and coded is not None and entry is not None:
            wider = (b for b in BITS if b > entry.bits and _obstacle(coded, b, entry.group) is None)
            self._wider = next(wider, None)
        self._refused[reason] += count

    def _image(self, module: str, part: Coded, source: torch.Tensor) -> PackedWeight:
        entry = self.entries[module]
        if module in self._nearest:
            return quantize(source, entry.bits, entry.group)
        image = part.image(entry.bits, entry.group, round_scales=module in self._scales)
        assert isinstance(image, PackedWeight)
        return image


def _group(found: Sequence[int | None], k: int, bits: int, wish: int | str | None) -> int:
    """The group of a unit with ``k`` inputs: the one asked for, the smallest of its parts, or lbq's default."""
    sizes = [size for size in found if size is not None]
    if wish is None and sizes and len(sizes) == len(found):
        return min(sizes)
    asked = scheme(bits, wish).group
    return effective_group(k, asked) or k


def _blocks(coded: Coded) -> Iterator[Coded]:
    """Rows, so many that what is made of them stays small."""
    n, k = coded.codes.shape
    rows = max(1, BLOCK // k)
    for start in range(0, n, rows):
        yield coded.rows(start, min(start + rows, n))


def _obstacle(coded: Coded, bits: int, group: int, *, round_scales: bool = False) -> str | None:
    """Why there is no image; None where there is."""
    images = (part.image(bits, group, round_scales=round_scales) for part in _blocks(coded))
    return next((image.reason for image in images if isinstance(image, NoImage)), None)
