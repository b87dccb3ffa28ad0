"""An artifact on disk: opened from headers alone, checked against its manifest, mapped tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from lbq.formats.disk import FileEntry, hash_file, listed
from lbq.formats.errors import DataError
from lbq.formats.manifest import MANIFEST, Manifest, QuantizedModule, read_manifest
from lbq.formats.packing import SCALE_DTYPE, PackedWeight, packed_words
from lbq.formats.safetensors_file import Checkpoint, open_checkpoint
from lbq.formats.safetensors_writer import TensorPlan
from lbq.formats.spec import Projection

DENSE_DTYPE = torch.bfloat16


def packed_tensors(module: str, entry: QuantizedModule) -> tuple[TensorPlan, TensorPlan, TensorPlan]:
    """The tensors that store one quantised linear layer: words, scales, shape."""
    return (
        TensorPlan(f"{module}.weight_packed", torch.int32, (entry.n, packed_words(entry.k, entry.bits))),
        TensorPlan(f"{module}.weight_scale", SCALE_DTYPE, (entry.n, entry.k // entry.group)),
        TensorPlan(f"{module}.weight_shape", torch.int64, (2,)),
    )


class Artifact:
    """An opened artifact. Tensors are views of the mapped files: nothing is read before it is used."""

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
        self.folder = folder
        self.manifest = manifest
        self.spec = manifest.spec
        self.quantized = manifest.quantized
        self._checkpoint = checkpoint

    def is_quantized(self, module: str) -> bool:
        """Whether the linear layer ``module`` is stored as codes; False for a name that is unknown, too."""
        return module in self.manifest.quantized

    def packed(self, module: str) -> PackedWeight:
        """The codes and scales of a quantised linear layer; KeyError for any other module."""
        entry = self.manifest.quantized[module]
        words, scales, _ = packed_tensors(module, entry)
        return PackedWeight(
            self._checkpoint.tensor(words.name), self._checkpoint.tensor(scales.name), entry.bits, entry.group, entry.k
        )

    def dense(self, name: str) -> torch.Tensor:
        """A BF16 tensor by its full name, ``….weight`` or ``….bias``; DataError for a name that is unknown."""
        return self._checkpoint.tensor(name)

    def release(self, module: str) -> None:
        """Drop the resident pages of a quantised layer that has been copied; KeyError for any other module."""
        for tensor in packed_tensors(module, self.manifest.quantized[module]):
            self._checkpoint.release(tensor.name)

    def release_dense(self, name: str) -> None:
        """Drop the resident pages of a BF16 tensor."""
        self._checkpoint.release(name)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(f.size for name, f in self.manifest.files.items() if name.endswith(".safetensors"))

    def close(self) -> None:
        """Unmap what nobody uses any more."""
        self._checkpoint.close()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_artifact(folder: Path | str) -> Artifact:
    """Open an artifact; reads the manifest and the headers of its shards, no weights.

    Raises StorageError for a missing folder, DataError where manifest, headers and spec do not agree.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    checkpoint = open_checkpoint(folder)
    try:
        _check_tensors(folder, manifest, checkpoint)
        _check_spec(folder, manifest)
        artifact = Artifact(folder, manifest, checkpoint)
        _check_shapes(artifact)
    except BaseException:
        checkpoint.close()
        raise
    return artifact


def verify(
    folder: Path, manifest: Manifest, on_bytes: Callable[[str, int], None] | None = None
) -> Iterator[tuple[str, str | None]]:
    """Hash every file that the ``manifest`` of ``folder`` lists: (file name, what is wrong or None), one by one.

    ``on_bytes(name, n)`` reports progress. Raises StorageError for a file that cannot be read.
    """
    for name, entry in manifest.files.items():
        yield name, _file_problem(folder / name, entry, partial(on_bytes, name) if on_bytes else None)


def _file_problem(path: Path, entry: FileEntry, on_bytes: Callable[[int], None] | None) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} bytes instead of {entry.size}"
    if hash_file(path, on_bytes).sha256 != entry.sha256:
        return "content differs from its sha256"
    return None


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: {name} is missing; fetch or convert the artifact again")
        size = path.stat().st_size
        if size != entry.size:
            raise DataError(f"{path}: {size} bytes instead of {entry.size}; fetch or convert the artifact again")


def _check_tensors(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """The shards are files of the manifest and hold exactly the tensors that it promises."""
    if strays := checkpoint.files.keys() - manifest.files.keys():
        raise DataError(f"{folder}: files not in the manifest: {listed(sorted(strays))}; remove them")
    expected = {t.name: t for module, entry in manifest.quantized.items() for t in packed_tensors(module, entry)}
    for name, dense in manifest.dense.items():
        if name in expected:
            raise DataError(f"{folder / MANIFEST}: {name} is both quantized and dense")
        expected[name] = TensorPlan(name, DENSE_DTYPE, dense.shape)
    names = set(checkpoint.names())
    for problem, odd in (("missing", expected.keys() - names), ("not in the manifest", names - expected.keys())):
        if odd:
            raise DataError(f"{folder}: tensors {problem}: {listed(sorted(odd))}")
    for tensor in expected.values():
        info = checkpoint.info(tensor.name)
        if (info.dtype, tuple(info.shape)) != (tensor.dtype, tensor.shape):
            raise DataError(
                f"{folder}: {tensor.name} is {info.dtype} {list(info.shape)}, "
                f"the manifest says {tensor.dtype} {list(tensor.shape)}"
            )


def _check_spec(folder: Path, manifest: Manifest) -> None:
    """Every tensor that the spec needs is there in the right shape, and nothing else is."""
    spec = manifest.spec
    needed: dict[str, tuple[int, ...]] = {f"{spec.embedding}.weight": (spec.vocab_size, spec.hidden_size)}
    modules: dict[str, Projection] = {}
    for projection in spec.projections():
        if projection.bias:
            needed[f"{projection.name}.bias"] = (projection.out_features,)
        if projection.name in manifest.quantized:
            modules[projection.name] = projection
        elif not (spec.tied and projection.name == spec.head.name):
            needed[f"{projection.name}.weight"] = (projection.out_features, projection.in_features)
    needed |= {f"{name}.weight": (width,) for name, width in spec.norms()}
    where = folder / MANIFEST
    if spec.tied and spec.head.name in manifest.quantized:
        raise DataError(f"{where}: the head is tied to the embedding and quantized too")
    for name, entry in manifest.quantized.items():
        projection_of = modules.get(name)
        if projection_of is None:
            raise DataError(f"{where}: quantized module {name} is not part of the model")
        if (entry.n, entry.k) != (projection_of.out_features, projection_of.in_features):
            raise DataError(f"{where}: {name} is {entry.n}×{entry.k}, which does not fit the model")
    for unit in spec.units():
        schemes = {manifest.quantized[p.name].scheme if p.name in manifest.quantized else None for p in unit}
        if len(schemes) > 1:
            raise DataError(f"{where}: {listed([p.name for p in unit])} are fused and differ in bits or group")
    dense = {name: tensor.shape for name, tensor in manifest.dense.items()}
    if dense != needed:
        odd = sorted(name for name in dense.keys() | needed.keys() if dense.get(name) != needed.get(name))
        raise DataError(f"{where}: {odd[0]} does not fit the model ({len(odd)} such)")


def _check_shapes(artifact: Artifact) -> None:
    for module, entry in artifact.manifest.quantized.items():
        shape = artifact.dense(f"{module}.weight_shape").tolist()
        if shape != [entry.n, entry.k]:
            raise DataError(f"{artifact.folder}: {module}.weight_shape is {shape}, not [{entry.n}, {entry.k}]")
