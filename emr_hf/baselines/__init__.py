"""Other methods, to compare EMR-Merging with. Pure functions on state dicts.

One set of weights for all tasks: [`weight_average`], [`task_arithmetic`], [`ties`], [`dare_linear`], [`dare_ties`].
Weights for each task, from the base and what is kept beside it: [`bitdelta`], [`ternary`].

Arithmetic is in float32, the result in the base's dtype. Only what all models share is merged: a tensor that is
missing somewhere, differs in shape or is not floating point is left out of the result. Take out a head by name first,
should it have one shape everywhere.
"""

from .compressed import CompressedTasks, bitdelta, ternary
from .linear import task_arithmetic, weight_average
from .sparse import dare_linear, dare_ties, ties

__all__ = [
    "CompressedTasks",
    "bitdelta",
    "dare_linear",
    "dare_ties",
    "task_arithmetic",
    "ternary",
    "ties",
    "weight_average",
]
