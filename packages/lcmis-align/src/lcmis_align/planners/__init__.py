"""Who splits a prompt into its concepts and thinks of new pairs: rules, a file of answers, or a language model."""

from lcmis_align.planners.base import ConceptPlanner
from lcmis_align.planners.file import FilePlanner
from lcmis_align.planners.http import OpenAICompatiblePlanner
from lcmis_align.planners.local import TransformersPlanner
from lcmis_align.planners.rule import RulePlanner

__all__ = ["ConceptPlanner", "FilePlanner", "OpenAICompatiblePlanner", "RulePlanner", "TransformersPlanner"]
