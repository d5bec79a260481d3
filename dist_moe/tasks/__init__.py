"""Tasks: data, losses and metrics of what a model learns, a folder per kind.

Importing this package registers the tasks that come with it.
"""

from dist_moe.tasks.evaluation import evaluate, evaluate_baselines
from dist_moe.tasks.graphs import GRAPH_TASKS
from dist_moe.tasks.images import TwoImagesSettings
from dist_moe.tasks.labelled_text import QuestionAnsweringSettings, TextClassificationSettings
from dist_moe.tasks.language import LanguageModelSettings
from dist_moe.tasks.multi_task_tables import TABLE_TASKS
from dist_moe.tasks.objective import WeightedObjective
from dist_moe.tasks.recommendation import RecommendationSettings
from dist_moe.tasks.settings import TASKS, TaskConfig, TaskSettings
from dist_moe.tasks.task import ExampleShape, Task, build_model

for _settings in (
    RecommendationSettings,
    TwoImagesSettings,
    LanguageModelSettings,
    TextClassificationSettings,
    QuestionAnsweringSettings,
    *TABLE_TASKS,
    *GRAPH_TASKS,
):
    TASKS.register(_settings)

__all__ = [
    "TASKS",
    "ExampleShape",
    "Task",
    "TaskConfig",
    "TaskSettings",
    "WeightedObjective",
    "build_model",
    "evaluate",
    "evaluate_baselines",
]
