"""The fused pass of a model that is split by whole layers over processes."""

from gisp.score.staged.staged_pass import StagedPass

__all__ = ["StagedPass"]
