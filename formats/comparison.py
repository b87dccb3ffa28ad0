"""Models side by side: what ``lbq compare`` and ``lbq sweep`` print (``docs/quality.md``)."""

from __future__ import annotations

from lbq.formats.quality import Estimate, Scores, Text
from lbq.formats.spec import Part

COMPARISON_VERSION = 1
SWEEP_VERSION = 1
WHOLE = 16  # bits of a linear layer that is not quantised


class Share(Part, frozen=True):
    """How many weights of linear layers have these bits and this group; None: a scale a row, or none at 16 bits."""

    bits: int
    group: int | None
    weights: int


class Storage(Part, frozen=True):
    """What a model's weights are stored as. Linear layers are all of them, the head among them, quantised or not."""

    tool: str  # who made it: "lbq rtn", "GPTQ", or "none" where nothing is quantised
    shares: tuple[Share, ...]  # of linear layers, the largest first
    nbytes: int  # all tensors
    bits_per_weight: float  # of linear layers: codes, scales, zero points and indices, or 16 bits


class Compared(Part, frozen=True):
    """One of several models. What was not measured is None."""

    model: str
    storage: Storage
    weight_cosine: float | None  # of all linear layers; without a reference, of the quantised ones by the manifest
    scores: Scores | None
    difference: Estimate | None  # of the KL divergence less that of the first model, on the same windows
    notes: tuple[str, ...]


class Comparison(Part, frozen=True):
    """Models against one reference on one text, or as they say they are where there is neither."""

    comparison_format: int
    reference: str | None
    device: str | None
    text: Text | None
    models: tuple[Compared, ...]
    notes: tuple[str, ...]


class Cell(Part, frozen=True):
    """A checkpoint rounded to nearest at some bits and group."""

    bits: int
    group: int | None  # as asked for; None: a scale a row
    storage: Storage
    weight_cosine: float  # of all linear layers
    scores: Scores
    tokens_per_second: float | None  # decoding on this machine; None: not measured
    notes: tuple[str, ...]


class Sweep(Part, frozen=True):
    """A checkpoint at every bits and group that were asked for, on one text and one machine."""

    sweep_format: int
    model: str
    device: str
    text: Text
    original: Storage
    original_tokens_per_second: float | None
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
