"""From a folder, or weights that are made otherwise, to a model on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch

from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DeviceError, UsageError
from lbq.runtime.devices import CacheKind, find_device, set_threads
from lbq.runtime.model import Model
from lbq.runtime.ready import ModelWeights


class LoadSettings(TypedDict, total=False):
    """Keyword arguments of everything that loads a model: where it runs and how.

    ``dtype="float32"`` is the reference mode: float32 activations and products, slow. ``context``: the most tokens of a
    text, at most the model's; by default the model's on the CPU, where the cache grows as needed, and on a GPU as many
    of at most 8192 as fit its memory. ``strict`` refuses kernels that are not the fast path, and a GPU that is there
    and not used. ``threads`` is torch's number of threads, for the whole process. ``kv_cache="int8"`` keeps keys and
    values in half the memory of the GPU's float16, a quarter of the CPU's float32, and less exactly, ``"int4"`` in
    half of that and far less exactly; ``"float"`` never does; ``"auto"`` keeps them in int8 on a GPU for a ``context``
    of more than 8192 tokens.
    """

    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32"]
    context: int | None
    strict: bool
    threads: int | None
    kv_cache: CacheKind


def load(path: Path | str, **settings: Unpack[LoadSettings]) -> Model:
    """Map the artifact in ``path`` and bind it to a device.

    Raises StorageError and DataError for the folder, UsageError for arguments, DeviceError for the device.
    """
    return bind_now(open_model(path, **settings))


def open_model(path: Path | str, **settings: Unpack[LoadSettings]) -> Model:
    """As :func:`load`, but the weights are bound when they are first needed: what is wrong before is said at once."""
    return open_weights(lambda _: open_artifact(path), **settings)


def open_weights(
    open_on: Callable[[torch.device], ModelWeights],
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32"] = "auto",
    context: int | None = None,
    strict: bool = False,
    threads: int | None = None,
    kv_cache: CacheKind = "auto",
) -> Model:
    """A model of whatever weights ``open_on`` opens for a device; they are bound when they are first needed."""
    if dtype not in ("auto", "float32"):
        raise UsageError(f"dtype {dtype}: auto or float32")
    if threads is not None:
        set_threads(threads)
    where = find_device(device, exact=dtype == "float32", kv_cache=kv_cache)
    if strict and where.note is not None:
        raise DeviceError(f"{where.note}; refused under --strict")
    weights = open_on(where.device)
    try:
        most = weights.spec.context
        if context is not None and not (isinstance(context, int) and 1 <= context <= most):
            raise UsageError(f"context {context}: {weights.folder} was made for 1 to {most} tokens")
        where.check_cache(weights.spec)
        return Model(weights, where, context, strict=strict)
    except BaseException:
        weights.close()
        raise


def bind_now(model: Model) -> Model:
    """The same model once its weights are bound; it is closed where that fails."""
    try:
        model.bind()
    except BaseException:
        model.close()
        raise
    return model
