"""The next token from logits on the device that has them, without the host: see ``triton``."""

from __future__ import annotations

import math
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
    """What passes from step to step on the device: the token, its position, and how to choose the next one."""

    def __init__(self, vocabulary: int, slots: int, device: torch.device) -> None:
        """For positions below ``slots``."""
        self.vocabulary = vocabulary
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.history = torch.zeros(
            slots + 1, dtype=torch.int64, device=device
        )  # the token at each position; −1: broken
        self.seen = torch.zeros(vocabulary, dtype=torch.int8, device=device)
        self.settings = torch.zeros(4, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(1, dtype=torch.int32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.programs = cdiv(vocabulary, BLOCK)
        self.scores = torch.empty(vocabulary, dtype=torch.float32, device=device)
        self.values = torch.empty((2, next_power_of_2(self.programs)), dtype=torch.float32, device=device)
        self.indices = torch.empty(next_power_of_2(self.programs), dtype=torch.int32, device=device)
        self.sums = torch.empty((self.programs, WAYS), dtype=torch.float32, device=device)
        self.bracket = torch.empty(5, dtype=torch.float32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)

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
        log_min = math.log(min_p) if min_p > 0 else -math.inf
        self.settings.copy_(torch.tensor([1 / temperature if sampled else 1.0, log_min, top_p, penalty]))
        self.top_k.fill_(min(top_k, self.vocabulary))
        self.seed.fill_(seed)
        if penalised:
            self.seen.zero_().index_fill_(0, seen.to(self.seen.device), 1)
        return Choice(
            sampled=sampled,
            penalty=penalised,
            top_k=sampled and 0 < top_k < self.vocabulary,
            top_p=sampled and top_p < 1.0,
        )


def choose(logits: torch.Tensor, chain: Chain, choice: Choice, *, pdl: bool = False) -> None:
    """The token after ``logits`` float32 [V] becomes the next step's, one position on, and part of the history.

    The filters are those of :class:`lbq.runtime.text.sampling.SamplingOptions`, in the same order; tokens of equal
    score at a filter's edge are all kept. Noise is of the seed, the position and the token alone.
    """
    assert logits.shape == (chain.vocabulary,)
    assert logits.dtype == torch.float32
    grid, v, options = (chain.programs,), chain.vocabulary, {"PDL": pdl, "num_warps": 4, **launch_options(pdl)}
    width = chain.indices.shape[0]
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
        chain.programs,
        BLOCK=BLOCK,
        PP=width,
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
        chain.programs,
        BLOCK=BLOCK,
        PP=width,
        PENALTY=choice.penalty,
        FILTERED=bool(searches),
        **options,
    )
