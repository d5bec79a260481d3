"""Labelled texts: the class of a text or of a pair, a number about it, or where in it an answer stands."""

from typing import ClassVar

from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig, prepare_labelled_text, prepare_questions
from dist_moe.tasks.labelled_text.classification import TextClassificationTask
from dist_moe.tasks.labelled_text.encoder import find_encoder
from dist_moe.tasks.labelled_text.question_answering import QuestionAnsweringTask
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from dist_moe.tasks.settings import TaskSettings


class TextClassificationSettings(LabelledTextConfig, TaskSettings):
    """Texts, or pairs of texts, with a class or a number as target."""

    kind: ClassVar[str] = "text_classification"
    target_names: ClassVar[tuple[str, ...]] = ("label",)

    def open(self, *, progress: bool) -> TextClassificationTask:
        """Find the encoder, prepare the texts and return the task."""
        self.check()  # before an encoder is fetched
        encoder = find_encoder(self.encoder, self.cache, progress=progress)
        return TextClassificationTask(prepare_labelled_text(self, encoder.tokenizer, progress=progress), encoder)


class QuestionAnsweringSettings(QuestionsConfig, TaskSettings):
    """Questions whose answers are pieces of a text, or that have none."""

    kind: ClassVar[str] = "question_answering"
    target_names: ClassVar[tuple[str, ...]] = ("answer",)

    def open(self, *, progress: bool) -> QuestionAnsweringTask:
        """Find the encoder, prepare the questions and return the task."""
        self.check()  # before an encoder is fetched
        encoder = find_encoder(self.encoder, self.cache, progress=progress)
        questions = prepare_questions(self, encoder.tokenizer, progress=progress)
        return QuestionAnsweringTask(questions, encoder, self.longest_answer)


__all__ = [
    "LabelledTextTask",
    "QuestionAnsweringSettings",
    "QuestionAnsweringTask",
    "TextClassificationSettings",
    "TextClassificationTask",
]
