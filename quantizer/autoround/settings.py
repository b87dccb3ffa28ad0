"""What a user may set of an AutoRound conversion, validated before any work."""

from __future__ import annotations

from dataclasses import dataclass

from lbq.formats.errors import UsageError

METHODS = ("rtn", "autoround")
DEFAULT_CALIBRATION = "NeelNanda/pile-10k"  # auto-round's own


@dataclass(frozen=True)
class Tuning:
    """``--iters``, ``--nsamples``, ``--seqlen``, ``--batch-size``, ``--seed`` and ``--calib``, in this order.

    Raises UsageError for what makes no sense.
    """

    iterations: int = 200
    samples: int = 128
    tokens: int = 2048
    batch: int = 8
    seed: int = 42
    calibration: str = DEFAULT_CALIBRATION

    def __post_init__(self) -> None:
        least = {
            "--iters": (self.iterations, 0),
            "--nsamples": (self.samples, 1),
            "--seqlen": (self.tokens, 2),
            "--batch-size": (self.batch, 1),
            "--seed": (self.seed, 0),
        }
        for option, (value, minimum) in least.items():
            if not minimum <= value <= 1 << 31:
                raise UsageError(f"{option} {value}: {minimum} or more")

    @property
    def calibrated(self) -> bool:
        """Whether any text is read."""
        return self.iterations > 0


def make_tuning(
    method: str,
    *,
    iters: int | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    calib: str | None = None,
) -> Tuning | None:
    """The settings of ``method``, None for round to nearest. Raises UsageError; also for an option without effect."""
    if method not in METHODS:
        raise UsageError(f"--method {method}: {' or '.join(METHODS)}")
    given = {
        "--iters": iters,
        "--nsamples": nsamples,
        "--seqlen": seqlen,
        "--batch-size": batch_size,
        "--seed": seed,
        "--calib": calib,
    }
    used = [option for option, value in given.items() if value is not None]
    if method == "rtn":
        if used:
            raise UsageError(f"{used[0]} has no effect on --method rtn; leave it out, or choose --method autoround")
        return None
    if iters == 0 and used != ["--iters"]:
        other = next(option for option in used if option != "--iters")
        raise UsageError(f"{other} has no effect with --iters 0, which reads no text and draws no samples")
    fields = zip(("iterations", "samples", "tokens", "batch", "seed", "calibration"), given.values(), strict=True)
    return Tuning(**{name: value for name, value in fields if value is not None})  # type: ignore[arg-type]
