"""The next token of one text or several from logits on the device that has them, without the host: see ``triton``."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

import torch
from triton import cdiv, next_power_of_2

from lbq.runtime.kernels.planes import launch_options
from lbq.runtime.kernels.sample import triton as kernels

__all__ = ["PASSES", "WAYS", "Chain", "Choice", "choose"]

BLOCK = 1024  # logits a program
WAYS = 64  # thresholds a pass
PASSES = 4


@dataclass(frozen=True)
class Choice:
    """Which kernels choose: what a CUDA graph is captured for. Greedy needs one, the rest two and PASSES a filter."""

    sampled: bool = False
    penalty: bool = False
    top_k: bool = False
    top_p: bool = False

    def __post_init__(self) -> None:
        assert self.sampled or not (self.top_k or self.top_p)


class Chain:
    """What passes from step to step on the device: the token, its position, and how to choose the next one.

    Every tensor has a row for each text.
    """

    def __init__(self, vocabulary: int, slots: int, device: torch.device, texts: int = 1) -> None:
        """For positions below ``slots``."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros((texts, *shape), dtype=dtype, device=device)

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty((texts, *shape), dtype=dtype, device=device)

        self.vocabulary, self.slots = vocabulary, slots
        self.token, self.position, self.seed = zeros(), zeros(), zeros()
        self.history = zeros(slots + 1)  # the token at each position; −1: broken
        self.seen = zeros(vocabulary, dtype=torch.int8)
        self.settings = zeros(4, dtype=torch.float32)
        self.top_k = zeros(dtype=torch.int32)
        self.programs = cdiv(vocabulary, BLOCK)
        self.width = next_power_of_2(self.programs)
        self.scores = scratch(vocabulary)
        self.values, self.indices = scratch(2, self.width), scratch(self.width, dtype=torch.int32)
        self.sums, self.bracket = scratch(self.programs, WAYS), scratch(5)
        self.counter = zeros(dtype=torch.int32)

    @property
    def texts(self) -> int:
        return self.token.shape[0]

    def of_text(self, text: int) -> Chain:
        """The part of one text."""
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value[text : text + 1])
        return part

    def start(self, token: int, position: int) -> None:
        """The next step is of ``token`` at ``position``."""
        self.token.fill_(token)
        self.position.fill_(position)

    def set(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        penalty: float,
        seed: int,
        seen: torch.Tensor,
    ) -> Choice:
        """How to choose from now on; ``seen``: int64 ids that the penalty is for. A ``temperature`` of 0 is greedy."""
        sampled, penalised = temperature > 0, penalty != 1.0
        # A greedy text among others that are not keeps the best token alone; one without a filter keeps all of them.
        log_min = 0.0 if not sampled else math.log(min_p) if min_p > 0 else -math.inf
        self.settings.copy_(torch.tensor([1 / temperature if sampled else 1.0, log_min, top_p, penalty]))
        self.top_k.fill_(min(top_k or self.vocabulary, self.vocabulary))
        self.seed.fill_(seed)
        if penalised:
            self.seen.zero_().index_fill_(1, seen.to(self.seen.device), 1)
        return Choice(
            sampled=sampled,
            penalty=penalised,
            top_k=sampled and 0 < top_k < self.vocabulary,
            top_p=sampled and top_p < 1.0,
        )


def choose(logits: torch.Tensor, chain: Chain, choice: Choice, *, pdl: bool = False) -> None:
    """The token after ``logits`` float32 [texts, V] becomes the next step's, one position on, and part of the history.

    The filters are those of :class:`lbq.runtime.text.sampling.SamplingOptions`, in the same order; tokens of equal
    score at a filter's edge are all kept. Noise is of the seed, the position and the token alone.
    """
    assert logits.shape[-1] == chain.vocabulary
    assert logits.numel() == chain.texts * chain.vocabulary
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    grid, v = (chain.programs, chain.texts), chain.vocabulary
    options = {"PDL": pdl, "num_warps": 4, **launch_options(pdl)}
    handed = (chain.token, chain.position, chain.history)
    kernels.begin[grid](
        logits,
        chain.scores,
        chain.seen,
        chain.settings,
        chain.values,
        chain.indices,
        chain.bracket,
        chain.counter,
        *handed,
        v,
        chain.slots,
        chain.programs,
        BLOCK=BLOCK,
        PP=chain.width,
        PENALTY=choice.penalty,
        GREEDY=not choice.sampled,
        **options,
    )
    if not choice.sampled:
        return
    searches = [mass for mass, wanted in ((False, choice.top_k), (True, choice.top_p)) if wanted]
    for mass in searches:
        for i in range(PASSES):
            kernels.narrow[grid](
                chain.scores,
                chain.settings,
                chain.top_k,
                chain.sums,
                chain.bracket,
                chain.counter,
                v,
                chain.programs,
                BLOCK=BLOCK,
                PART=128,
                WAYS=WAYS,
                MASS=mass,
                FIRST=i == 0,
                **{**options, "num_warps": 8},
            )
    kernels.draw[grid](
        chain.scores,
        chain.seen,
        chain.settings,
        chain.seed.view(torch.int32),
        chain.values,
        chain.indices,
        chain.bracket,
        chain.counter,
        *handed,
        v,
        chain.slots,
        chain.programs,
        BLOCK=BLOCK,
        PP=chain.width,
        PENALTY=choice.penalty,
        FILTERED=bool(searches),
        **options,
    )
