"""Sampling: class labels or prompts to images."""

from .animation import save_animation
from .pipeline_class_to_image import ClassToImagePipeline
from .pipeline_text_to_image import TextToImagePipeline

__all__ = ["ClassToImagePipeline", "TextToImagePipeline", "save_animation"]
