"""Wan 2.1 video models, their sampling and their memory, without ComfyUI."""

from .media import load_video, save_video
from .model_config import ModelConfig
from .pipeline import WanVideoPipeline

__all__ = ["ModelConfig", "WanVideoPipeline", "load_video", "save_video"]
