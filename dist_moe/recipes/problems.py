"""From a configuration to the problem whose data it names."""

from __future__ import annotations

from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig, prepare_labelled_text, prepare_questions
from dist_moe.data.movielens import MovieLensConfig, prepare
from dist_moe.data.text import TextConfig, prepare_text
from dist_moe.data.two_images import prepare_two_images
from dist_moe.recipes.config import RunConfig
from dist_moe.recipes.decoder_start_config import DecoderStartConfig
from dist_moe.recipes.language_model import LanguageModelProblem
from dist_moe.recipes.problem import Problem
from dist_moe.recipes.question_answering import QuestionAnsweringProblem
from dist_moe.recipes.recommender import RecommenderProblem
from dist_moe.recipes.text_classification import TextClassificationProblem
from dist_moe.recipes.text_problem import TextProblem
from dist_moe.recipes.text_start import find_encoder
from dist_moe.recipes.text_start_config import TextStartConfig
from dist_moe.recipes.two_images import TwoImagesProblem


def open_problem(config: RunConfig, *, progress: bool) -> Problem:
    """Prepare the data. Raises UserError if the data cannot be had."""
    if isinstance(config.data, MovieLensConfig):
        return RecommenderProblem(prepare(config.data, progress=progress))
    if isinstance(config.data, TextConfig):
        start = config.start if isinstance(config.start, DecoderStartConfig) else None
        return LanguageModelProblem(prepare_text(config.data, progress=progress), start)
    if isinstance(config.data, LabelledTextConfig | QuestionsConfig):
        return _open_texts(config, config.data, progress)
    return TwoImagesProblem(prepare_two_images(config.data, progress=progress))


def _open_texts(config: RunConfig, data: LabelledTextConfig | QuestionsConfig, progress: bool) -> TextProblem:
    data.check()  # before an encoder is fetched
    start = config.start if isinstance(config.start, TextStartConfig) else TextStartConfig()
    encoder = find_encoder(start, data.cache, progress=progress)
    if isinstance(data, QuestionsConfig):
        questions = prepare_questions(data, encoder.tokenizer, progress=progress)
        return QuestionAnsweringProblem(questions, encoder, start, data.longest_answer)
    texts = prepare_labelled_text(data, encoder.tokenizer, progress=progress)
    return TextClassificationProblem(texts, encoder, start)
