"""A report on the robustness of models, from the results that the tools of this package write."""

from .collect import describe_model, make_curve, make_examples
from .page import slug
from .results import PARTS, DamagedFileError, ModelResults, read_results
from .sections import write_report

__all__ = [
    'PARTS',
    'DamagedFileError',
    'ModelResults',
    'describe_model',
    'make_curve',
    'make_examples',
    'read_results',
    'slug',
    'write_report',
]
