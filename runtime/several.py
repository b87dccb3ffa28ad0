"""Several texts of one model: together where a device gains by it, else one after the other."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

from lbq.formats.errors import DeviceError
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import CudaDevice, Device, device_errors
from lbq.runtime.ready import Ready
from lbq.runtime.text.batch import Request, batch_texts
from lbq.runtime.text.result import Result
from lbq.runtime.text.sampling import BrokenLogitsError
from lbq.runtime.text.tokenizer import Tokenizer

SLOTS = 256  # tokens that a text's keys and values are allocated by


def results(
    ready: Ready,
    device: Device,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    eos_ids: Collection[int],
    *,
    places: int | None,
    strict: bool,
) -> Generator[tuple[int, Result], None, None]:
    """Whole texts, each with the number of its request, as they end; at most ``places`` of them together.

    ``strict``: raise DeviceError for a GPU on which they would take turns.
    """
    decoder, context = ready.bound.decoder, ready.engines.context
    slots = min(context, max((_slots(request, context) for request in requests), default=1))
    wanted = len(requests) if places is None else min(places, len(requests))
    if strict and wanted > 1:
        _refuse_turns(device, decoder)
    with device_errors():
        wanted = 1 if wanted <= 1 else min(wanted, device.most_places(decoder, slots))
    if wanted <= 1:
        for i, request in enumerate(requests):
            yield i, ready.engines.stream(tokenizer, request, eos_ids).result()
        return
    with device_errors():
        batch = device.batch(decoder, slots, wanted)
        for i, text, finish in batch_texts(batch, tokenizer, requests, eos_ids):
            yield i, Result(text, finish, BrokenLogitsError() if finish.reason == "error" else None)


def _refuse_turns(device: Device, decoder: Decoder) -> None:
    if not isinstance(device, CudaDevice) or device.exact:
        return
    turns = device.batch_fallback(decoder, 2)
    if turns is not None:
        raise DeviceError(f"texts are decoded one after the other, because {turns}; refused under --strict")


def _slots(request: Request, context: int) -> int:
    """Tokens that the text of ``request`` may come to, in whole steps of memory."""
    most = request.options.max_tokens
    return context if most is None else -(-(len(request.ids) + most) // SLOTS) * SLOTS
