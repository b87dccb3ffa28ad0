"""What a user asks a conversion for, validated before any work."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lbq.formats.errors import UsageError
from lbq.formats.packing import BITS, GROUPS
from lbq.formats.scheme import Scheme
from lbq.quantizer.autoround.settings import Tuning

READERS = ("vllm", "sglang")
DEFAULT_GROUP = 128
SHARD_BYTES = 5_000_000_000
OVERRIDE = re.compile(r"(.+)=([0-9]{1,3})(?::([0-9]{1,6}|row))?")


@dataclass(frozen=True)
class Override:
    """``--set PATTERN=BITS[:GROUP]``."""

    pattern: str
    scheme: Scheme
    text: str  # as it was given

    @staticmethod
    def parse(text: str, base: Scheme) -> Override:
        """Read ``down_proj=8`` or ``layers.0=8:128``; without a group, ``base``'s where both are under 8 bits.

        Raises UsageError.
        """
        found = OVERRIDE.fullmatch(text)
        if found is None:
            raise UsageError(f"--set {text}: expected PATTERN=BITS or PATTERN=BITS:GROUP, such as down_proj=8")
        pattern, bits, group = found.groups()
        try:
            chosen = mixed_scheme(int(bits), base) if group is None else scheme(int(bits), group)
        except UsageError as error:
            raise UsageError(f"--set {text}: {error}") from None
        return Override(pattern, chosen, text)


@dataclass(frozen=True)
class MixedBits:
    """Bits of every fused unit, in the spec's order, chosen for a size: ``--target-bpw``.

    They stand in for the request's bits and for ``lm_head`` where it is None; what an override or ``keep`` names, and
    a head whose bits were asked for, is theirs. Groups are as for ``--set PATTERN=BITS``.
    """

    target_bpw: float
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Settings of a conversion. Raises UsageError for what makes no sense."""

    scheme: Scheme
    lm_head: int | None = None  # None: 8, or what is chosen for it
    keep: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    readers: tuple[str, ...] = ()
    max_shard_bytes: int = SHARD_BYTES
    strict: bool = False
    mixed: MixedBits | None = None
    tuning: Tuning | None = None  # None: round to nearest

    def __post_init__(self) -> None:
        if self.lm_head not in (None, 4, 8, 16):
            raise UsageError(f"--lm-head {self.lm_head}: 4, 8 or 16 bits")
        for reader in self.readers:
            if reader not in READERS:
                raise UsageError(f"--for {reader}: known readers are {', '.join(READERS)}")
        if self.max_shard_bytes < 1:
            raise UsageError("--max-shard-size must be positive")


def scheme(bits: int, group: int | str | None = None) -> Scheme:
    """A scheme from the command line's words; without a group: a row at 8 bits, 128 below. Raises UsageError."""
    if bits not in BITS:
        raise UsageError(f"{bits} bits are not supported: {', '.join(map(str, BITS))} are")
    if group is None:
        return Scheme(bits, None if bits == 8 else DEFAULT_GROUP)
    if group == "row":
        return Scheme(bits, None)
    try:
        size = int(group)
    except ValueError:
        size = 0
    if size not in GROUPS:
        raise UsageError(f"group size {group} is not supported: {', '.join(map(str, GROUPS))} and row are")
    return Scheme(bits, size)


def mixed_scheme(bits: int, base: Scheme) -> Scheme:
    """A scheme of other bits beside ``base``: of its group where both are under 8 bits. Raises UsageError."""
    if bits < 8 and base.bits < 8:
        return scheme(bits, "row" if base.group is None else base.group)
    return scheme(bits)


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern names a module: it matches, as a shell glob, a run of whole components of the dotted name.

    ``down_proj``, ``layers.0``, ``layers.[0-3].mlp`` and ``model.layers.0.mlp.down_proj`` all name that module.
    """
    parts = module.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[start:stop]), pattern)
        for start in range(len(parts))
        for stop in range(start + 1, len(parts) + 1)
    )


def make_request(
    bits: int = 4,
    group: int | str | None = None,
    *,
    lm_head: int | None = None,
    keep: Sequence[str] = (),
    overrides: Sequence[str] = (),
    readers: Sequence[str] = (),
    max_shard_bytes: int = SHARD_BYTES,
    strict: bool = False,
    tuning: Tuning | None = None,
) -> Request:
    """A request from plain values, as the command line and :func:`lbq.convert` take them. Raises UsageError."""
    base = scheme(bits, group)
    return Request(
        base,
        lm_head,
        tuple(keep),
        tuple(Override.parse(text, base) for text in overrides),
        tuple(readers),
        max_shard_bytes,
        strict,
        tuning=tuning,
    )
