"""A decode step of some weights, profiled where they run: what ``lbq profile`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lbq.formats.errors import UsageError
from lbq.runtime.bench.profile import Profile, profile_decode
from lbq.runtime.bench.sweep import SMALLER, Machine, Variant, machine
from lbq.runtime.binding import bind
from lbq.runtime.devices import Device, device_errors

DEPTH = 256


@dataclass(frozen=True)
class Profiled:
    """A step of ``weights`` (``INT4 g256, INT8 row``) behind ``depth`` tokens. ``cache_fallback``: why keys and values
    are not read as they are kept, if so."""

    subject: str
    weights: str
    machine: Machine
    depth: int
    profile: Profile
    cache_fallback: str | None


def profile_variant(
    subject: str, variant: Variant, device: Device, depth: int | None, steps: int, trace: Path | None = None
) -> Profiled:
    """Bind ``variant`` and profile its step, by default behind DEPTH tokens or as many as the model was made for.

    Raises UsageError for a depth that it was not made for.
    """
    most = variant.spec.context - 2
    depth = min(DEPTH, most) if depth is None else depth
    if not 1 <= depth <= most:
        raise UsageError(f"depth {depth}: the model was made for {variant.spec.context} tokens; at most {most}")
    with device_errors(SMALLER):
        device.check_cache(variant.spec)
        on = machine(device.device)
        decoder = bind(variant.open(device.device), device).decoder
        found = profile_decode(decoder, device, variant.quantized, depth, steps, trace)
        return Profiled(subject, variant.label, on, depth, found, device.cache_fallback(decoder))
