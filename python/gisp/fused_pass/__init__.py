"""One forward and backward pass that ends in scores: no autograd graph, no weight gradient that is not needed."""

from gisp.fused_pass.batch import FurtherAnswers, Units
from gisp.fused_pass.importance_pass import ImportancePass
from gisp.fused_pass.products import Float8Products
from gisp.fused_pass.support import differs, is_rms_norm, is_silu, why_not

__all__ = [
    "Float8Products",
    "FurtherAnswers",
    "ImportancePass",
    "Units",
    "differs",
    "is_rms_norm",
    "is_silu",
    "why_not",
]
