"""Graphs: the class of each node."""

from typing import ClassVar

from dist_moe.data.graphs import GraphSettings, NamedGraphConfig, OwnGraphConfig
from dist_moe.tasks.graphs.task import NodeClassificationTask
from dist_moe.tasks.settings import TaskSettings


class NodeTask(GraphSettings, TaskSettings):
    """A task on the nodes of a graph; a subclass has the settings of its data as well."""

    kind: ClassVar[str] = NodeClassificationTask.kind
    target_names: ClassVar[tuple[str, ...]] = ("class",)

    def open(self, *, progress: bool) -> NodeClassificationTask:
        """Prepare the graph and return the task."""
        return NodeClassificationTask(self.prepare(progress))


class NamedGraphSettings(NamedGraphConfig, NodeTask):
    """A published graph, with the class of each node as target."""


class OwnGraphTaskSettings(OwnGraphConfig, NodeTask):
    """A graph of the user's own, with the class of each node as target."""


GRAPH_TASKS = (NamedGraphSettings, OwnGraphTaskSettings)

__all__ = ["GRAPH_TASKS", "NodeClassificationTask", "NodeTask"]
