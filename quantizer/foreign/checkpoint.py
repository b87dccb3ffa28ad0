"""A checkpoint that another tool quantised, opened from headers: spec, quantised layers, and everything else.

As weights for a runtime it is dense: what its codes stand for, in float32, made when it is asked for. Whether a layer
has an exact image in lbq's format is :meth:`ForeignCheckpoint.image`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats.artifact import DENSE_DTYPE
from lbq.formats.disk import shown
from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.formats.safetensors_file import Checkpoint, open_checkpoint
from lbq.formats.spec import ModelSpec, Projection
from lbq.quantizer.families import read_quantized
from lbq.quantizer.foreign.autoround import parse_autoround
from lbq.quantizer.foreign.awq import parse_awq
from lbq.quantizer.foreign.coded import Coded, NoImage
from lbq.quantizer.foreign.compressed import parse_compressed
from lbq.quantizer.foreign.gguf import Gguf, open_gguf
from lbq.quantizer.foreign.gptq import parse_gptq
from lbq.quantizer.foreign.layout import Layout, Stored
from lbq.quantizer.foreign.mlx import parse_mlx
from lbq.quantizer.plan import check_names, check_source
from lbq.quantizer.prepare import head_differs
from lbq.quantizer.source import SourceFolder

Parser = Callable[[bytes, str], Layout]

PARSERS: dict[str, Parser] = {
    "compressed-tensors": parse_compressed,
    "gptq": parse_gptq,
    "awq": parse_awq,
    "auto-round": parse_autoround,
    "intel/auto-round": parse_autoround,
}
READABLE = "compressed-tensors, GPTQ, AWQ, AutoRound and MLX"


class _Method(msgspec.Struct):
    quant_method: str | None = None  # MLX names none


class ForeignCheckpoint:
    """An opened checkpoint of another tool, quantised or not; BF16 tensors are views of mapped files."""

    def __init__(
        self,
        source: SourceFolder,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        layout: Layout | None,
        layers: dict[str, Stored],
        notes: tuple[str, ...],
    ) -> None:
        self.folder = source.folder
        self.spec = spec
        self.notes = notes
        self.layers = layers  # quantised ones, by module; MLX has the embedding among them
        self.checkpoint, self._layout = checkpoint, layout

    @property
    def tool(self) -> str | None:
        """What the tensors are named and laid out after; None where nothing is quantised."""
        return self._layout.tool if self._layout else None

    def coded(self, module: str) -> Coded:
        """A quantised layer as it is stored. KeyError for any other; DataError for values without a meaning."""
        assert self._layout is not None
        return self._layout.read(self.checkpoint, self.layers[module])

    def image(self, module: str) -> PackedWeight | NoImage:
        """A quantised layer in lbq's format, weight by weight the same, or why there is no such image."""
        return self.coded(module).image()

    def nbytes(self, module: str) -> int:
        """Bytes of a linear layer's weight: codes, scales, zero points and indices, or floats; a tied head's are the
        embedding's."""
        names = [name for name in self.tensors(module) if not name.endswith(".weight_shape")]
        return sum(self.checkpoint.info(name).nbytes for name in names)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.checkpoint.info(name).nbytes for name in self.checkpoint.names())

    def is_quantized(self, module: str) -> bool:
        """False: a runtime gets what the codes stand for."""
        del module
        return False

    def packed(self, module: str) -> PackedWeight:
        """No runtime gets codes."""
        raise AssertionError(f"{module} is given dense")

    def dense(self, name: str) -> torch.Tensor:
        """A tensor by its full name: BF16 where it is stored so, else float32. Raises DataError as :meth:`coded`."""
        module = name.removesuffix(".weight")
        if module in self.layers and name != module:
            return self.coded(module).dequantize()
        tensor = self.checkpoint.tensor(name)
        return tensor if tensor.dtype == DENSE_DTYPE else tensor.to(torch.float32)

    def release(self, module: str) -> None:
        """No runtime gets codes."""
        raise AssertionError(f"{module} is given dense")

    def release_dense(self, name: str) -> None:
        """Drop the resident pages that a tensor was made from."""
        module = name.removesuffix(".weight")
        for tensor in self.tensors(module) if name != module else (name,):
            self.checkpoint.release(tensor)

    def close(self) -> None:
        """Unmap what nobody uses any more."""
        self.checkpoint.close()

    def __enter__(self) -> ForeignCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def tensors(self, module: str) -> tuple[str, ...]:
        """The tensors that a linear layer's weight, or the embedding, is stored as; a tied head's is the embedding."""
        if self.spec.tied and module == self.spec.head.name:
            module = self.spec.embedding
        return self.layers[module].tensors if module in self.layers else (f"{module}.weight",)


def open_foreign(source: SourceFolder) -> ForeignCheckpoint:
    """Open a checkpoint, quantised by another tool or not at all, or a GGUF file, by itself or beside the folder of the
    model that it was made of; reads its config and headers, and zero points where labels are known to lie.

    Raises DataError for a method or a setting that lbq does not read and for headers that do not fit, StorageError for
    files.
    """
    if source.folder.is_file():
        return _opened(source, *open_gguf(source.folder))
    adapted, settings = read_quantized(source.folder)
    if source.file is not None:
        return _opened(source, *open_gguf(source.file, adapted.spec))
    layout = _layout(settings, f"{source.folder / 'config.json'}: quantization_config") if settings else None
    return _opened(source, adapted.spec, open_checkpoint(source.folder), layout)


def _opened(source: SourceFolder, spec: ModelSpec, checkpoint: Checkpoint, layout: Layout | None) -> ForeignCheckpoint:
    """A checkpoint whose headers fit its spec; it is closed where they do not."""
    try:
        layers = _locate(spec, checkpoint, layout)
        if layout is not None:
            layout = layout.settle(checkpoint, layers.values())
        own, notes = _untie(spec, checkpoint, layers)
        _check_rest(own, spec.tied, checkpoint, layers)
    except BaseException:
        checkpoint.close()
        raise
    return ForeignCheckpoint(source, checkpoint, own, layout, layers, (*(layout.notes if layout else ()), *notes))


def _layout(settings: bytes, where: str) -> Layout:
    method = json_file.decode(settings, _Method, where).quant_method
    parse = parse_mlx if method is None else PARSERS.get(method)
    if parse is None:
        raise DataError(f"{where}: quant_method {shown(method or '')} is not supported: {READABLE} are")
    return parse(settings, where)


def _locate(spec: ModelSpec, checkpoint: Checkpoint, layout: Layout | None) -> dict[str, Stored]:
    """The quantised layers: those with the layout's tensors."""
    if layout is None:
        return {}
    shapes = {p.name: (p.out_features, p.in_features) for p in spec.projections()}
    shapes[spec.embedding] = (spec.vocab_size, spec.hidden_size)
    found = {
        name: layout.locate(checkpoint, name, *shape)
        for name, shape in shapes.items()
        if f"{name}.{layout.marker}" in checkpoint
    }
    if not found and not isinstance(layout, Gguf):  # such a file may be of floats alone
        raise DataError(f"{checkpoint.folder}: quantized by its config, but no layer has a {layout.marker}")
    return found


def _untie(spec: ModelSpec, checkpoint: Checkpoint, layers: dict[str, Stored]) -> tuple[ModelSpec, tuple[str, ...]]:
    """A head that is stored by itself is not the embedding, whatever the config says."""
    if not spec.tied:
        return spec, ()
    apart = msgspec.structs.replace(spec, tied=False)
    if spec.head.name in layers:
        return apart, ()
    if head_differs(spec, checkpoint):
        return apart, (
            "the config ties the head to the embedding, the checkpoint saves another: the saved one is used",
        )
    return spec, ()


def _check_rest(spec: ModelSpec, tied: bool, checkpoint: Checkpoint, layers: dict[str, Stored]) -> None:
    """Every other tensor of the model is there in its shape, and no tensor is left over."""
    needed: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name, width in spec.norms()}
    if spec.embedding not in layers:
        needed[f"{spec.embedding}.weight"] = (spec.vocab_size, spec.hidden_size)
    head = f"{spec.head.name}.weight"
    for p in spec.projections():
        if p.name not in layers and not (spec.tied and p.name == spec.head.name):
            needed[f"{p.name}.weight"] = (p.out_features, p.in_features)
        if p.bias:
            needed[f"{p.name}.bias"] = (p.out_features,)
    stored = {name for layer in layers.values() for name in layer.tensors}
    spare = {head} if tied and spec.tied else set()
    check_names(checkpoint, needed.keys() | stored, spare | _idle_biases(spec, checkpoint, layers))
    for name, shape in needed.items():
        check_source(checkpoint, name, shape)


def _idle_biases(spec: ModelSpec, checkpoint: Checkpoint, layers: dict[str, Stored]) -> set[str]:
    """Biases of zeros that AutoGPTQ gives every quantised layer, also where the model has none."""

    def idle(p: Projection) -> bool:
        name = f"{p.name}.bias"
        return p.name in layers and not p.bias and name in checkpoint and not bool(checkpoint.tensor(name).any())

    return {f"{p.name}.bias" for p in spec.projections() if idle(p)}
