from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbq.formats.packing import GROUPS
from lbq.formats.scheme import Scheme, effective_group


@pytest.mark.parametrize(
    ("k", "asked", "group"),
    [
        (4096, 256, 256),
        (4096, None, None),
        (576, 256, 64),  # SmolLM2: 576 = 9·64
        (896, 256, 128),
        (1536, 512, 512),
        (4864, 512, 256),
        (4304, 128, None),  # 4304 = 16·269
        (48, 32, None),
        (97, 32, None),
        (1, 32, None),
        (256, 256, None),  # one group is a row
        (64, 512, None),
        (64, 32, 32),
    ],
)
def test_effective_group(k: int, asked: int | None, group: int | None) -> None:
    assert effective_group(k, asked) == group


@given(k=st.integers(1, 2**17), asked=st.sampled_from(GROUPS))
def test_effective_group_is_the_largest_that_fits(k: int, asked: int) -> None:
    fitting = [g for g in GROUPS if g <= asked and k % g == 0]
    largest = max(fitting, default=None)
    assert effective_group(k, asked) == (None if largest == k else largest)


@pytest.mark.parametrize(("bits", "group"), [(5, 64), (4, 0), (4, -7), (4, 96), (8, 1024)])
def test_scheme_refuses(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        Scheme(bits, group)
    with pytest.raises(msgspec.ValidationError, match="must be one of"):
        msgspec.convert({"bits": bits, "group": group}, Scheme)
