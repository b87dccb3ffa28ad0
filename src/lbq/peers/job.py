"""What the process of a peer is told, and what it answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from lbq.formats.spec import ModelSpec


class Job(msgspec.Struct, frozen=True):
    """Decode ``new`` tokens behind ``prompt`` ones, ``rounds`` times after one that is not counted."""

    contender: str
    spec: ModelSpec
    prompt: int
    new: int
    rounds: int
    device: Literal["cpu", "cuda"]
    threads: int


class Answer(msgspec.Struct, frozen=True):
    """Tokens a second of each round behind the first token, and seconds to that one; or why there are none."""

    rates: tuple[float, ...] = ()
    first_token_seconds: float = 0.0
    failure: str | None = None
