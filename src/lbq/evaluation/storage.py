"""What a model's weights are stored as, by kind of model: from headers and manifests, nothing is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lbq.formats.artifact import DENSE_DTYPE, Artifact, packed_tensors
from lbq.formats.comparison import WHOLE, Share, Storage
from lbq.formats.manifest import DenseTensor, QuantizedModule
from lbq.formats.safetensors_writer import TensorPlan
from lbq.formats.spec import ModelSpec
from lbq.quantizer.foreign import ForeignCheckpoint
from lbq.quantizer.plan import Plan


def storage_of(model: Artifact | ForeignCheckpoint) -> Storage:
    """An artifact's by its manifest, another checkpoint's by its headers."""
    if isinstance(model, Artifact):
        manifest = model.manifest
        return _stored(f"lbq {manifest.method.name}", model.spec, manifest.quantized, manifest.dense)
    shares: Counter[tuple[int, int | None]] = Counter()
    nbytes = 0
    for p in model.spec.projections():
        tied = model.spec.tied and p.name == model.spec.head.name
        layer = model.layers.get(model.spec.embedding if tied else p.name)
        scheme = (layer.setting.bits, layer.setting.group) if layer else (WHOLE, None)
        shares[scheme] += p.out_features * p.in_features
        nbytes += model.nbytes(p.name) if layer else WHOLE // 8 * p.out_features * p.in_features
    return _storage(model.tool or "none", shares, model.weight_bytes, nbytes)


def storage_of_plan(tool: str, plan: Plan) -> Storage:
    """Of what a conversion would write."""
    return _stored(tool, plan.spec, plan.quantized, plan.dense)


def _stored(
    tool: str, spec: ModelSpec, quantized: Mapping[str, QuantizedModule], dense: Mapping[str, DenseTensor]
) -> Storage:
    """Of lbq's own layout."""
    shares: Counter[tuple[int, int | None]] = Counter()
    linear = 0
    for p in spec.projections():
        entry = quantized.get(p.name)
        shares[(entry.bits, entry.scheme.group) if entry else (WHOLE, None)] += p.out_features * p.in_features
        data = packed_tensors(p.name, entry)[:2] if entry else ()
        linear += sum(t.nbytes for t in data) if entry else WHOLE // 8 * p.out_features * p.in_features
    packed = sum(t.nbytes for module, entry in quantized.items() for t in packed_tensors(module, entry))
    kept = sum(TensorPlan(name, DENSE_DTYPE, tensor.shape).nbytes for name, tensor in dense.items())
    return _storage(tool, shares, packed + kept, linear)


def _storage(tool: str, shares: Counter[tuple[int, int | None]], nbytes: int, linear_bytes: int) -> Storage:
    parts = tuple(Share(bits, group, weights) for (bits, group), weights in shares.most_common())
    return Storage(tool, parts, nbytes, 8 * linear_bytes / shares.total())
