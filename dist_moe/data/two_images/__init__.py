"""MultiMNIST and MultiFashionMNIST: two images in one. `prepare_two_images` gives tables of pairs of images."""

from dist_moe.data.two_images.prepare import (
    FRAME_SIDE,
    ImageBatch,
    ImagePairs,
    TwoImages,
    TwoImagesConfig,
    prepare_two_images,
)

__all__ = ["FRAME_SIDE", "ImageBatch", "ImagePairs", "TwoImages", "TwoImagesConfig", "prepare_two_images"]
