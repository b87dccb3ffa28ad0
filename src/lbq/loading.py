"""Loading a model: an artifact by the runtime alone, a checkpoint by the quantizer and the runtime together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from lbq.formats.errors import UsageError
from lbq.formats.manifest import MANIFEST
from lbq.hub.artifacts import find_artifact
from lbq.hub.client import OnNote, quiet
from lbq.runtime.loading import LoadSettings, bind_now, open_model, open_weights
from lbq.runtime.model import Model

if TYPE_CHECKING:  # an artifact loads without the quantizer
    from lbq.quantizer.prepare import Prepared
    from lbq.quantizer.writing import OnProgress

__all__ = ["check_checkpoint", "load", "quantize_on_load"]


def load(
    model: Path | str,
    *,
    bits: int | None = None,
    group: int | Literal["row"] | None = None,
    lm_head: int | None = None,
    keep: Sequence[str] = (),
    overrides: Sequence[str] = (),
    revision: str | None = None,
    on_note: OnNote | None = None,
    **settings: Unpack[LoadSettings],
) -> Model:
    """Load an artifact; or, with ``bits``, a checkpoint that is quantized now. Both are folders or Hub ids.

    ``bits`` to ``revision`` are those of :func:`lbq.convert`, and the codes are those that it would write. The
    checkpoint is quantized tensor by tensor on the device: nothing is written, and memory holds the result and one
    tensor. ``on_note`` hears of what differs from the request, and of the Hub. ``settings``:
    :class:`lbq.runtime.loading.LoadSettings`.

    Raises StorageError and DataError for files, UsageError for arguments, RemoteError for the Hub, DeviceError for the
    device.
    """
    if bits is None:
        if group is not None or lm_head is not None or keep or overrides:
            raise UsageError("group, lm_head, keep and overrides go with bits, which quantizes a checkpoint")
        return bind_now(open_model(find_artifact(model, revision, on_note=on_note or quiet), **settings))
    from lbq.quantizer.prepare import prepare
    from lbq.quantizer.request import make_request
    from lbq.quantizer.source import resolve

    strict = settings.get("strict", False)
    request = make_request(bits, group, lm_head=lm_head, keep=keep, overrides=overrides, strict=strict)
    check_checkpoint(model)
    prepared = prepare(resolve(model, revision, on_note or quiet), request)
    if on_note is not None:
        for text in prepared.plan.notes:
            on_note(text)
    return bind_now(quantize_on_load(prepared, **settings))


def quantize_on_load(
    prepared: Prepared, on_progress: OnProgress | None = None, **settings: Unpack[LoadSettings]
) -> Model:
    """A model of a prepared conversion; it is quantized when its weights are first needed, or by ``bind``."""
    from lbq.quantizer.on_load import QuantizedOnLoad

    return open_weights(lambda device: QuantizedOnLoad(prepared, device, on_progress), **settings)


def check_checkpoint(model: Path | str) -> None:
    """Raise UsageError for an artifact, whose bits are what they are."""
    if (Path(model) / MANIFEST).is_file():
        raise UsageError(
            f"{model}: an artifact, quantized already: --bits and what goes with it are for checkpoints; leave them out"
        )
