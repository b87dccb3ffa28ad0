"""How far quantised weights are from their source, measured while they stream by."""

from __future__ import annotations

import math

import torch

from lbq.formats.manifest import QuantizedModule, Summary
from lbq.formats.report import ModuleReport
from lbq.formats.spec import Part


class Measured(Part, frozen=True):
    """A finished matrix: its line of the report, and the sums that it adds to those of the model."""

    report: ModuleReport
    source: float
    result: float
    error: float

    @property
    def cosine(self) -> float:
        """The report's."""
        return self.report.cosine


class Meter:
    """Sums over the row blocks of one matrix; float64, so that a billion terms add up."""

    def __init__(self) -> None:
        self.source = 0.0  # ‖W‖²
        self.result = 0.0  # ‖Ŵ‖²
        self.error = 0.0  # ‖W − Ŵ‖²
        self.worst_row_error = 0.0
        self.worst_row = 0
        self._rows = 0

    def add(self, weight: torch.Tensor, result: torch.Tensor) -> None:
        """Account for the next rows: float32 [rows, K] before and after. ``result`` is overwritten."""
        source_rows = _square_sums(weight)
        result_rows = _square_sums(result)
        error_rows = _square_sums(result.sub_(weight))
        self.source += float(source_rows.sum())
        self.result += float(result_rows.sum())
        self.error += float(error_rows.sum())
        relative = torch.where(error_rows > 0, error_rows / source_rows, 0.0)
        worst, row = relative.max(0)
        if float(worst) > self.worst_row_error**2:
            self.worst_row_error = math.sqrt(float(worst))
            self.worst_row = self._rows + int(row)
        self._rows += weight.shape[0]

    @property
    def cosine(self) -> float:
        """⟨W, Ŵ⟩ / (‖W‖ ‖Ŵ‖) by 2⟨W, Ŵ⟩ = ‖W‖² + ‖Ŵ‖² − ‖W − Ŵ‖²; 1 where they are equal."""
        if not self.error:
            return 1.0
        norms = math.sqrt(self.source) * math.sqrt(self.result)
        return (self.source + self.result - self.error) / (2 * norms) if norms else 0.0

    @property
    def relative_error(self) -> float:
        """0 where both are zero."""
        return math.sqrt(self.error / self.source) if self.source else 0.0

    def measured(self, name: str, entry: QuantizedModule) -> Measured:
        """What is kept of a finished matrix."""
        return Measured(self.report(name, entry), self.source, self.result, self.error)

    def report(self, name: str, entry: QuantizedModule) -> ModuleReport:
        """The module's line of the report."""
        return ModuleReport(
            name=name,
            n=entry.n,
            k=entry.k,
            bits=entry.bits,
            group=entry.group,
            cosine=self.cosine,
            relative_error=self.relative_error,
            worst_row_error=self.worst_row_error,
            worst_row=self.worst_row,
        )


class Totals(Meter):
    """Sums over matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = 0
        self.worst_cosine = 1.0

    def include(self, module: Meter | Measured, entry: QuantizedModule) -> None:
        """Add a finished matrix."""
        self.source += module.source
        self.result += module.result
        self.error += module.error
        self.weights += entry.n * entry.k
        self.worst_cosine = min(self.worst_cosine, module.cosine)

    def summary(self, bits_per_weight: float) -> Summary:
        """The manifest's summary."""
        return Summary(self.weights, bits_per_weight, self.cosine, self.worst_cosine, self.relative_error)


def _square_sums(x: torch.Tensor) -> torch.Tensor:
    """Σ x² of every row of a float32 matrix: float64 [rows]."""
    norms = torch.linalg.vector_norm(x, dim=1)
    if not bool(((norms > 1e-15) & (norms < 1e18)).all()):  # squares may have vanished or overflowed
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    squares: torch.Tensor = norms.double().square_()
    return squares
