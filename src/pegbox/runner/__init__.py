"""The runner: what a protocol trains and measures through. It knows stages, models and suites, and no method."""

from pegbox.runner.checks import check_spec, facts_of
from pegbox.runner.data import RunData
from pegbox.runner.runner import RecipeRunner

__all__ = ["RecipeRunner", "RunData", "check_spec", "facts_of"]
