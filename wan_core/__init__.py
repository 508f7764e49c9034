"""Wan video models, their sampling and their memory, without ComfyUI."""

from .loading.state_dict import load_state_dict
from .media import VideoData, load_video, save_frames, save_video
from .model_config import ModelConfig
from .pipeline import WanVideoPipeline

__all__ = [
    "ModelConfig",
    "VideoData",
    "WanVideoPipeline",
    "load_state_dict",
    "load_video",
    "save_frames",
    "save_video",
]
