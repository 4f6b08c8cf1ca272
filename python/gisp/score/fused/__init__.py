"""One forward and backward pass that ends in scores: no autograd graph, no weight gradient that is not needed."""

from gisp.score.fused.batch import Followers, MicroBatch, SampleGroups
from gisp.score.fused.importance_pass import ImportancePass
from gisp.score.fused.products import Float8Products
from gisp.score.fused.support import differs, why_not

__all__ = [
    "Float8Products",
    "Followers",
    "ImportancePass",
    "MicroBatch",
    "SampleGroups",
    "differs",
    "why_not",
]
