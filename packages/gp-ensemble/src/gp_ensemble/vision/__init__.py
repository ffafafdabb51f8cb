"""From images to feature tables with real pre-trained models (extra `vision`)."""

from gp_ensemble.vision.extraction import extract_features
from gp_ensemble.vision.extractors import (
    CallableExtractor,
    Extractor,
    OpenClipExtractor,
    TimmExtractor,
    TorchvisionExtractor,
    TransformersExtractor,
    make_extractor,
)
from gp_ensemble.vision.images import ImageSet, open_images, open_split

__all__ = [
    "CallableExtractor",
    "Extractor",
    "ImageSet",
    "OpenClipExtractor",
    "TimmExtractor",
    "TorchvisionExtractor",
    "TransformersExtractor",
    "extract_features",
    "make_extractor",
    "open_images",
    "open_split",
]
