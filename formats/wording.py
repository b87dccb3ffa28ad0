"""How text and sizes are shown, wherever lbq shows them: on a terminal, in a report's page."""

from __future__ import annotations


def plain(text: str) -> str:
    """``text`` on one line, control characters escaped: what files say must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(nbytes: float) -> str:
    """``140.9 MB``"""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")


def pattern(name: str) -> str:
    """``model.layers.*.mlp.down_proj``: a name with its numbers left out."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``7 layers``"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def rate(value: float) -> str:
    """``4.27 TB/s``"""
    return f"{value / 1e12:.2f} TB/s" if value >= 1e12 else f"{value / 1e9:.1f} GB/s"
