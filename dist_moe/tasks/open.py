"""From a configuration to the problem whose data it names."""

from __future__ import annotations

from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig, prepare_labelled_text, prepare_questions
from dist_moe.data.movielens import MovieLensConfig, prepare_movielens
from dist_moe.data.text import TextConfig, prepare_text
from dist_moe.data.two_images import prepare_two_images
from dist_moe.recipes.supervised.config import RunConfig
from dist_moe.recipes.supervised.start.bert import find_encoder
from dist_moe.recipes.supervised.start.bert_config import TextStartConfig
from dist_moe.recipes.supervised.start.decoder_config import DecoderStartConfig
from dist_moe.tasks.images.task import TwoImagesProblem
from dist_moe.tasks.labelled_text.classification import TextClassificationProblem
from dist_moe.tasks.labelled_text.question_answering import QuestionAnsweringProblem
from dist_moe.tasks.labelled_text.task import TextProblem
from dist_moe.tasks.language.task import LanguageModelProblem
from dist_moe.tasks.recommendation.task import RecommenderProblem
from dist_moe.tasks.task import Problem


def open_problem(config: RunConfig, *, progress: bool) -> Problem:
    """Prepare the data. Raises UserError if the data cannot be had."""
    if isinstance(config.data, MovieLensConfig):
        return RecommenderProblem(prepare_movielens(config.data, progress=progress))
    if isinstance(config.data, TextConfig):
        start = config.start if isinstance(config.start, DecoderStartConfig) else None
        return LanguageModelProblem(prepare_text(config.data, progress=progress), start)
    if isinstance(config.data, LabelledTextConfig | QuestionsConfig):
        return _open_texts(config, config.data, progress)
    return TwoImagesProblem(prepare_two_images(config.data, progress=progress))


def _open_texts(config: RunConfig, data: LabelledTextConfig | QuestionsConfig, progress: bool) -> TextProblem:
    data.check()  # before an encoder is fetched
    start = config.start if isinstance(config.start, TextStartConfig) else TextStartConfig()
    if data.encoder is not None:
        start = start.model_copy(update={"encoder": data.encoder})
    encoder = find_encoder(start, data.cache, progress=progress)
    if isinstance(data, QuestionsConfig):
        questions = prepare_questions(data, encoder.tokenizer, progress=progress)
        return QuestionAnsweringProblem(questions, encoder, start, data.longest_answer)
    texts = prepare_labelled_text(data, encoder.tokenizer, progress=progress)
    return TextClassificationProblem(texts, encoder, start)
