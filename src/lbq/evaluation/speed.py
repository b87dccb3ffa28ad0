"""How fast weights decode on a device, by the kernels of ``lbq run``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from lbq.runtime.binding import Weights, bind
from lbq.runtime.devices import Device

TOKENS = 32  # a round
ROUNDS = 5  # and one before, which warms up


def decode_speed(weights: Weights, device: Device, prompt: Sequence[int]) -> float:
    """Tokens a second, greedy, one text at a time, behind the token ids ``prompt``: the median over ROUNDS.

    Binding, which is not timed, takes the memory of a loaded model; nothing of it is kept.
    """
    engine = device.engine(bind(weights, device).decoder, len(prompt) + TOKENS)
    seconds = []
    for _ in range(1 + ROUNDS):
        engine.truncate(0)
        token = int(engine.prefill(prompt).argmax())
        began = time.perf_counter()
        for _ in range(TOKENS):
            token = int(engine.decode(token).argmax())
        seconds.append(time.perf_counter() - began)
    return TOKENS / statistics.median(seconds[1:])
