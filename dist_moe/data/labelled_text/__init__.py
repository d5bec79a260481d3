"""Labelled texts: sentiment, questions, spam, topics; from a user's copy GLUE, and SQuAD's questions with answers."""

from dist_moe.data.labelled_text.answers import AnswerTable
from dist_moe.data.labelled_text.prepared_questions import Questions, QuestionsConfig, prepare_questions
from dist_moe.data.labelled_text.prepared_texts import LabelledText, LabelledTextConfig, prepare_labelled_text
from dist_moe.data.labelled_text.tasks import GRADED, TASKS, TextTask
from dist_moe.data.labelled_text.tokens import LabelledBatch, LabelledTable

__all__ = [
    "GRADED",
    "TASKS",
    "AnswerTable",
    "LabelledBatch",
    "LabelledTable",
    "LabelledText",
    "LabelledTextConfig",
    "Questions",
    "QuestionsConfig",
    "TextTask",
    "prepare_labelled_text",
    "prepare_questions",
]
