"""What ``lbq bench`` and ``lbq profile`` measure, and how they write what they found."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lbq.cli.display import note
from lbq.cli.options import group_list, number_list
from lbq.formats.errors import StorageError, UsageError
from lbq.runtime.bench.shapes import SHAPES

if TYPE_CHECKING:
    from lbq.runtime.bench.sweep import Variant
    from lbq.runtime.devices import Device

shape_option = click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    metavar="NAME",
    help=f"Random weights of this shape, and nothing is fetched: {', '.join(SHAPES)}.",
)

kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(["auto", "float", "int8", "int4"]),
    default="auto",
    help="float: 16 bits on a GPU; int8, int4: less, and less exact; auto: int8 for more than 8192 tokens on a GPU.",
)

fused_option = click.option(
    "--fused/--no-fused",
    default=None,
    help="On a GPU: by the fused step and the prompts' kernels, or not.  [as lbq run]",
)


def stepping(device: Device, fused: bool | None) -> Device:
    """``device`` with or without the fused step. Raises UsageError for a CPU, which has none."""
    from lbq.runtime.devices import CudaDevice

    if fused is None:
        return device
    if not isinstance(device, CudaDevice):
        raise UsageError("--fused and --no-fused are for a GPU")
    return replace(device, fused=fused)


@dataclass(frozen=True)
class Subject:
    """Weights in one variant or several."""

    name: str
    variants: list[Variant]


def find_subject(
    artifact: str | None, shape: str | None, bits: str | None, groups: str | None, stack: ExitStack
) -> Subject:
    """An artifact, open as long as ``stack``, or random weights. Raises UsageError for both and for neither."""
    from lbq.runtime.bench.sweep import artifact_variant, other_groups, shape_variants

    if (artifact is None) == (shape is None):
        raise UsageError("give an ARTIFACT, or --shape NAME for random weights: one of the two")
    if shape is not None:
        widths = number_list("4" if bits is None else bits, "--bits", "3,4,8")
        chosen = () if groups is None else group_list(groups)
        variants = shape_variants(shape, widths, chosen)
        for text in other_groups(shape, chosen):
            note(text)
        return Subject(f"{shape} (random weights)", variants)
    from lbq.formats.artifact import open_artifact
    from lbq.hub.artifacts import find_artifact

    assert artifact is not None
    if bits is not None or groups is not None:
        raise UsageError(f"--bits and --gs go with --shape: {artifact} has the bits that it has")
    opened = stack.enter_context(open_artifact(find_artifact(artifact, on_note=note)))
    return Subject(artifact, [artifact_variant(opened)])


def check_place(path: Path | None) -> None:
    """Raise StorageError for a file whose folder is not there, before anything is measured for it."""
    if path is not None and not path.parent.is_dir():
        raise StorageError(f"{path}: no such folder")


def seconds(value: float) -> str:
    """``1.25 s``, ``14.3 ms``, ``7.1 µs``"""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"
