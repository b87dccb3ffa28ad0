"""Engines are used again when their state is sound, and know what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lbq.runtime.engines import EnginePool, TrackedEngine
from lbq.runtime.text.generation import GenerationOptions
from lbq.runtime.text.sampling import SamplingOptions

Scripted = Callable[..., Any]
PLAIN = GenerationOptions()


def test_all_but_one_token_is_reused_at_most(scripted: Scripted) -> None:
    engine = scripted([1, 1, 1])
    engine.ids = [4, 4]
    tracked = TrackedEngine(engine)
    assert engine.ids == []
    tracked.prefill([1, 2])
    tracked.decode(3)
    shared = [tracked.reusable(ids, PLAIN) for ids in ([1, 2, 3], [1, 2, 3, 4], [1, 9, 3], [9], [1], [1, 2])]
    assert shared == [2, 3, 1, 0, 0, 1]
    tracked.truncate(2)
    assert (tracked.position, engine.position, tracked.reusable([1, 2, 3], PLAIN)) == (2, 2, 2)
    assert tracked.reusable([1, 2, 3], GenerationOptions(sampling=SamplingOptions(seed=1))) == 0


def test_an_interrupted_truncation_claims_no_more_than_is_held(scripted: Scripted) -> None:
    engine = scripted([1])
    tracked = TrackedEngine(engine)
    tracked.prefill([1, 2, 3])

    def interrupted(length: int) -> None:
        del engine.ids[length:]
        raise KeyboardInterrupt

    engine.truncate = interrupted
    with pytest.raises(KeyboardInterrupt):
        tracked.truncate(1)
    assert tracked.position == engine.position == 1


def test_one_engine_is_kept(scripted: Scripted) -> None:
    pool = EnginePool(lambda: scripted([]), 9)
    with pool.engine() as first, pool.engine() as second:
        assert first is not second
    assert pool.idle is first
    with pool.engine() as again:
        assert again is first
        assert pool.idle is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, ValueError])
def test_only_a_reader_that_stops_leaves_a_sound_engine(scripted: Scripted, error: type[BaseException]) -> None:
    pool = EnginePool(lambda: scripted([]), 9)
    with pytest.raises(error), pool.engine() as engine:
        raise error
    assert pool.idle is (None if error is ValueError else engine)
