"""Kernels compiled before they are timed, on all cores: each is launched once in another process."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

import torch

from lbq.runtime.bench.context import Bench, Model, start_plan
from lbq.runtime.bench.tune import Search, step_weights
from lbq.runtime.cache import KVCache
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine_cuda import CudaEngine
from lbq.runtime.fused.plan import ROLES, Plan, Role
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels import batch
from lbq.runtime.kernels.batch import BatchTile
from lbq.runtime.kernels.hashes import settle

BATCH_TILES = tuple(
    BatchTile(*each) for each in ((1, 4, 2), (4, 2, 4), (8, 1, 2), (8, 2, 4), (1, 4, 2, 2), (4, 2, 2, 2), (8, 1, 2, 2))
)


@dataclass(frozen=True)
class Job:
    """One kernel of a plan, or with no role the present engine's."""

    model: Model
    role: Role | Literal["attention", "batch"] | None
    plan: Plan
    tile: BatchTile | None = None  # of "batch"


@cache
def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


_made: dict[Model, Decoder] = {}


def compile_job(job: Job) -> str | None:
    """Put a kernel into Triton's cache by launching it; in words what went wrong, if anything."""
    try:
        if job.model not in _made:
            _made.clear()
            torch.cuda.empty_cache()
            # Of two layers: what the last layer's down projection hands on is the head's.
            _made[job.model] = job.model.decoder(_device(), layers=2)
        decoder = _made[job.model]
        if job.role is None:
            CudaEngine(decoder, 256, graphs=False).decode(1)
        elif job.role == "batch":
            _launch_batches(decoder, job.tile)
        else:
            step = FusedStep(decoder, 256, job.plan)
            if job.role == "attention":
                cache_ = decoder.new_state(256, dtype=torch.float16, fixed=True).layers[0]
                assert isinstance(cache_, KVCache)
                position = torch.zeros(1, dtype=torch.int64, device=decoder.device)
                for short in (False, True):
                    step.layers[0].attention.launch(position, cache_, pdl=job.plan.pdl, short=short)
            else:
                step.products(job.role)[0].launch(pdl=job.plan.pdl)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job.model} {job.role}: {type(error).__name__}: {error}"[:300]
    return None


def _launch_batches(decoder: Decoder, tile: BatchTile | None) -> None:
    """All that ``details.batches`` launches with a tile."""
    for weight in step_weights(decoder).values():
        for tokens in (4, 8, 16):
            x = torch.randn(tokens, weight.k, device=decoder.device)
            if batch.why_not(weight) is None:
                batch.batch(batch.planes(x, weight.bits), weight, tile=tile)


def jobs_of(model: Model, plans: list[Plan]) -> list[Job]:
    """One for each kernel in which any two of the plans differ."""
    found: dict[tuple[object, ...], Job] = {}
    for plan in plans:
        for role in ROLES:
            found.setdefault((role, getattr(plan, role), plan.pdl), Job(model, role, plan))
        found.setdefault(("attention", plan.split, plan.short, plan.pdl), Job(model, "attention", plan))
    return list(found.values())


def compile_all(bench: Bench, jobs: list[Job]) -> None:
    if bench.pool is None:
        return
    troubles = [trouble for trouble in bench.pool.map(compile_job, jobs, chunksize=2) if trouble is not None]
    for trouble in troubles[:10]:
        bench.say(f"does not compile or run: {trouble}")


def start_pool(bench: Bench, models: list[Model]) -> list[Future[str | None]]:
    """Begin to compile what descents will try first, while the main process checks."""
    cores = min(14, (os.cpu_count() or 2) - 1)
    settle()  # here and there, so that what is compiled there is found here
    bench.pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), initializer=settle)
    jobs: list[Job] = []
    for model in models:
        decoder = model.decoder(bench.device, layers=1)
        search = Search(decoder, bench.sms, lambda _: 0.0, lambda _: None, bench.left, again=bench.again)
        plans = [*search.first_candidates(start_plan(bench)), Plan(pdl=bench.pdl), Plan(pdl=False)]
        jobs += [Job(model, None, Plan()), *jobs_of(model, plans)]
        if model.shape == models[0].shape:
            jobs += [Job(model, "batch", Plan(), tile) for tile in BATCH_TILES]
    bench.say(f"{len(jobs)} kernels are compiled on {cores} cores meanwhile.")
    return [bench.pool.submit(compile_job, job) for job in jobs]


def wait_for(bench: Bench, compiled: list[Future[str | None]]) -> None:
    troubles = [trouble for future in compiled if (trouble := future.result(timeout=max(bench.left() - 60, 1)))]
    bench.say(f"{len(compiled)} kernels compiled, {len(troubles)} did not.")
    for trouble in islice(troubles, 10):
        bench.say(f"- {trouble}")
