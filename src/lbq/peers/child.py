"""The process of one peer: a job on stdin, an answer as the last line on stdout."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence

import msgspec
import torch

from lbq.peers.contenders import CONTENDERS
from lbq.peers.job import Answer, Job
from lbq.peers.models import Generating, random_model


def decode(job: Job) -> Answer:
    """Run ``job``. A call for all tokens less a call for one is what the others take."""
    contender, device = CONTENDERS[job.contender], torch.device(job.device)
    torch.set_num_threads(job.threads)
    torch.manual_seed(1)
    model = random_model(job.spec, device)
    contender.prepare(model, device)
    generating = Generating(model, device, compiled=contender.compiled)
    rounds = [
        (generating.seconds(job.prompt, 1), generating.seconds(job.prompt, job.new)) for _ in range(1 + job.rounds)
    ]
    return answer(job.new, rounds[1:])


def answer(new: int, rounds: Sequence[tuple[float, float]]) -> Answer:
    """What rounds of seconds for one token and for ``new`` of them say."""
    first = statistics.median(one for one, _ in rounds)
    rest = [all_ - first for _, all_ in rounds]
    if min(rest) <= 0:
        return Answer(
            failure=f"{new} tokens took it no longer than 1: something else runs here, or --tokens are too few"
        )
    return Answer(tuple((new - 1) / seconds for seconds in rest), first)


def main() -> None:
    """Answer the job on stdin; libraries that print do so on stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        found = decode(job)
    except Exception as error:  # whatever it is, it is the peer's, and the others go on
        text = " ".join(str(error).split())[:200]
        found = Answer(failure=f"{type(error).__name__}: {text}")
    answers.write(msgspec.json.encode(found))
    answers.close()


if __name__ == "__main__":
    main()
