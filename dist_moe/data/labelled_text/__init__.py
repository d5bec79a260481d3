"""Labelled texts for classification and regression: sentiment, questions, spam, topics, and GLUE from a copy."""

from dist_moe.data.labelled_text.prepared_texts import LabelledText, LabelledTextConfig, prepare_labelled_text
from dist_moe.data.labelled_text.table import LabelledBatch, LabelledTable
from dist_moe.data.labelled_text.tasks import GRADED, TASKS, TextTask

__all__ = [
    "GRADED",
    "TASKS",
    "LabelledBatch",
    "LabelledTable",
    "LabelledText",
    "LabelledTextConfig",
    "TextTask",
    "prepare_labelled_text",
]
