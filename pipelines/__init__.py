"""Sampling: class labels to images."""

from .pipeline_class_to_image import ClassToImagePipeline

__all__ = ["ClassToImagePipeline"]
