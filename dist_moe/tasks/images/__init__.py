"""Images: which two images were added to one another? On MultiMNIST and MultiFashionMNIST."""

from typing import ClassVar

from dist_moe.data.two_images import TwoImagesConfig, prepare_two_images
from dist_moe.tasks.images.task import TARGETS, TwoImagesTask
from dist_moe.tasks.settings import TaskSettings


class TwoImagesSettings(TwoImagesConfig, TaskSettings):
    """MultiMNIST or MultiFashionMNIST, with the class of each of the two images as targets."""

    kind: ClassVar[str] = "two_images"
    target_names: ClassVar[tuple[str, ...]] = TARGETS

    def open(self, *, progress: bool) -> TwoImagesTask:
        """Prepare the images and return the task."""
        return TwoImagesTask(prepare_two_images(self, progress=progress))


__all__ = ["TwoImagesSettings", "TwoImagesTask"]
