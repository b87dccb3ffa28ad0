"""Where the codes of a conversion come from: round to nearest, made as they are written, or AutoRound's work folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import torch

from lbq import __version__
from lbq.formats import manifest as manifests
from lbq.formats.disk import FileEntry
from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import INDEX, Checkpoint
from lbq.quantizer import tensors
from lbq.quantizer.autoround import work as works
from lbq.quantizer.autoround.blocks import LAYERS
from lbq.quantizer.autoround.run import OnProgress, Tuner
from lbq.quantizer.autoround.tuner import products_dtype
from lbq.quantizer.autoround.work import Work
from lbq.quantizer.calibration import Calibration, calibrate
from lbq.quantizer.plan import Keep, Plan, Quantize
from lbq.quantizer.request import Request
from lbq.quantizer.rtn import DEFAULT_RULES
from lbq.quantizer.tensors import OnBlock

MEASURED_ROWS = tensors.CPU_BLOCK  # weights compared with their source at a time


class Weights(Protocol):
    """What writes an artifact asks for, in the order of the plan."""

    def packed(self, step: Quantize, on_block: OnBlock) -> PackedWeight:
        """Codes and scales of a layer; ``on_block`` sees its rows and what they became."""
        ...

    def dense(self, step: Keep) -> torch.Tensor:
        """A tensor that stays BF16. Raises DataError for NaN and infinity."""
        ...

    def finish(self) -> None:
        """The artifact stands."""
        ...


@dataclass(frozen=True)
class Given:
    """Codes that are there already, and what the manifest says of their making."""

    weights: Weights
    method: manifests.Method | manifests.Import


class Rounded:
    """Every layer by round to nearest."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device

    def packed(self, step: Quantize, on_block: OnBlock) -> PackedWeight:
        return tensors.quantized(self._checkpoint, step, self._device, on_block)

    def dense(self, step: Keep) -> torch.Tensor:
        return tensors.dense(self._checkpoint, step)

    def finish(self) -> None:
        """There is nothing to tidy."""


class Tuned:
    """Layers of blocks from finished work, and the head by round to nearest."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, tuner: Tuner, work: Work) -> None:
        self._rounded = Rounded(checkpoint, device)
        self._checkpoint, self._tuner, self._work = checkpoint, tuner, work

    def packed(self, step: Quantize, on_block: OnBlock) -> PackedWeight:
        if not step.module.startswith(LAYERS + "."):
            return self._rounded.packed(step, on_block)
        packed = self._tuner.packed(int(step.module.split(".")[2]))[step.module]
        source = self._checkpoint.tensor(step.source)
        rows = max(1, MEASURED_ROWS // packed.k)
        for start in range(0, packed.n, rows):
            part = packed.rows(start, min(start + rows, packed.n))
            on_block(source[start : start + rows].float(), part)
        return packed

    def dense(self, step: Keep) -> torch.Tensor:
        return self._rounded.dense(step)

    def finish(self) -> None:
        """Remove the work folder."""
        self._work.remove()


def read_calibration(
    request: Request, folder: Path, context: int, notes: list[str], *, dry_run: bool
) -> Calibration | None:
    """The samples that a request needs; what differs from it is added to ``notes``. See :func:`calibrate`.

    A ``dry_run`` reads nothing and returns None.
    """
    tuning = request.tuning
    if tuning is None or not tuning.calibrated:
        return None
    length = min(tuning.tokens, context)
    if length < tuning.tokens:
        notes.append(f"calibration samples have {length} tokens, not {tuning.tokens}: the model's context")
    if dry_run:
        return None
    found = calibrate(tuning.calibration, folder, tuning.samples, length, tuning.seed)
    if len(found.tokens) < tuning.samples:
        notes.append(
            f"{tuning.calibration} gives {len(found.tokens)} samples of {length} tokens, "
            f"{tuning.samples} were asked for"
        )
    return found


def described(request: Request, calibration: Calibration | None, device: torch.device) -> manifests.Method:
    """The manifest's entry."""
    scheme, mixed, tuning = request.scheme, request.mixed, request.tuning
    method = manifests.Method(
        scale_rules={str(bits): rule.value for bits, rule in sorted(DEFAULT_RULES.items())},
        bits=scheme.bits if mixed is None else None,
        group=scheme.group,
        lm_head=request.lm_head or (8 if mixed is None else None),
        keep=request.keep,
        set=tuple(override.text for override in request.overrides),
        readers=request.readers,
        target_bpw=None if mixed is None else mixed.target_bpw,
    )
    if tuning is None:
        return method
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    fields = {name: getattr(method, name) for name in method.__struct_fields__}
    return manifests.AutoRound(
        **fields,
        iterations=tuning.iterations,
        batch=tuning.batch,
        seed=tuning.seed,
        device=kind,
        products="bfloat16" if products_dtype(device) == torch.bfloat16 else "float32",
        calibration=None if calibration is None else calibration.described(),
    )


def device_name(device: torch.device) -> str:
    """A GPU by its model, else ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tools(request: Request) -> dict[str, str]:
    """Versions of what decides the codes."""
    names = () if request.tuning is None else ("auto-round", "transformers")
    return {"lbq": __version__, "torch": str(torch.__version__)} | {name: version(name) for name in names}


def tuned(
    request: Request,
    folder: Path,
    plan: Plan,
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    files: Mapping[str, FileEntry],
    target: Path,
    device: torch.device,
    *,
    restart: bool,
    on_progress: OnProgress,
) -> Tuned:
    """Tune every block that is not finished, beside ``target``, whose lock the caller holds. ``files`` are the hashes
    of the source. Raises what :class:`Work` and :class:`Tuner` raise."""
    method = described(request, calibration, device)
    assert isinstance(method, manifests.AutoRound)
    assert request.tuning is not None
    header = works.Header(
        work_format=works.VERSION,
        tools=tools(request),
        source={name: files[name] for name in files if name in ("config.json", INDEX, *checkpoint.files)},
        method=method,
        layers={
            step.module: (step.entry.bits, step.group, step.entry.group)
            for step in plan.steps
            if isinstance(step, Quantize) and step.module.startswith(LAYERS + ".")
        },
        device=device_name(device),
    )
    work = Work(target)
    work.open(header, restart=restart)
    tokens = torch.empty((0, 1), dtype=torch.int64) if calibration is None else calibration.tokens
    try:
        tuner = Tuner(folder, plan, checkpoint, request.tuning, tokens, work, device)
        tuner.run(on_progress)
    except DataError:
        if not work.numbers("block"):  # there is nothing to go on with, and bad data stay bad
            work.remove()
        raise
    return Tuned(checkpoint, device, tuner, work)
