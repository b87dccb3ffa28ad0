"""The process of one peer: a job on stdin, an answer as the last line on stdout."""

from __future__ import annotations

import os
import sys

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
    rates, first = [], []
    for _ in range(1 + job.rounds):
        one, all_ = generating.seconds(job.prompt, 1), generating.seconds(job.prompt, job.new)
        first.append(one)
        rates.append((job.new - 1) / max(1e-9, all_ - one))
    return Answer(tuple(rates[1:]), sorted(first[1:])[job.rounds // 2])


def main() -> None:
    """Answer the job on stdin; libraries that print do so on stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        answer = decode(job)
    except Exception as error:  # whatever it is, it is the peer's, and the others go on
        text = " ".join(str(error).split())[:200]
        answer = Answer(failure=f"{type(error).__name__}: {text}")
    answers.write(msgspec.json.encode(answer))
    answers.close()


if __name__ == "__main__":
    main()
