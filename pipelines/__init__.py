"""Sampling: class labels to images."""

from .animation import save_animation
from .pipeline_class_to_image import ClassToImagePipeline

__all__ = ["ClassToImagePipeline", "save_animation"]
