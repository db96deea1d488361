"""A report on the robustness of models, from the results that the tools of this package write."""

from .collect import describe_model, make_examples
from .content import slug
from .page import write_report
from .results import PARTS, read_results

__all__ = ['PARTS', 'describe_model', 'make_examples', 'read_results', 'slug', 'write_report']
