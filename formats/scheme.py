"""What one matrix is quantised to, and the group it can have."""

from __future__ import annotations

import msgspec

from lbq.formats.packing import BITS, GROUPS


class Scheme(msgspec.Struct, frozen=True):
    """Symmetric integer codes of ``bits`` bits with one scale for every ``group`` inputs; None: one scale a row.

    ValueError (msgspec makes it a ValidationError when decoding) for bits or a group that lbq does not have.
    """

    bits: int
    group: int | None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits}")
        if self.group is not None and self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))} or null (a row), not {self.group}")


def effective_group(k: int, asked: int | None) -> int | None:
    """The group that a matrix with ``k`` inputs gets when ``asked`` was requested; None stands for a whole row.

    The largest power of two ≥ 32 that divides ``k`` and is at most ``asked``, else the row. A group of exactly ``k``
    inputs is the row too: the stored scales are the same [N, 1], and every reader has a kernel for one scale a row.
    The request is met as it stands if and only if ``asked is None`` or ``k % asked == 0``; else it is a fallback.
    """
    assert k > 0
    assert asked is None or asked in GROUPS
    if asked is None:
        return None
    group = min(asked, k & -k)  # k & -k: the largest power of two that divides k
    return group if group >= min(GROUPS) and group != k else None


def other_group(k: int, asked: int | None) -> str | None:
    """What is said where ``asked`` does not divide ``k`` inputs; None where it does."""
    if asked is None or k % asked == 0:
        return None
    group = effective_group(k, asked)
    instead = f"groups of {group}" if group else "one scale a row"
    return f"{k} inputs do not divide into groups of {asked}: {instead} instead"
