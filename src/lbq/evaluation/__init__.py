"""What quantisation costs: an artifact's next-token distributions against those of the model it was made from.

This composes quantizer and runtime, which know nothing of each other: the one opens the original, the other decodes.
"""

from __future__ import annotations

from lbq.evaluation.comparison import compare
from lbq.evaluation.run import evaluate
from lbq.formats.comparison import Comparison
from lbq.formats.quality import Evaluation

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]
