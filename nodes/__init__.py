"""The node classes by the ids that workflows save. Ids never change."""

from .bridge import FromConditioning, FromVAE, ToConditioning
from .camera import CameraEncode, MovePath, RowsPath
from .control_encode import ControlEncode
from .image_encode import ImageEncode
from .info import CheckpointInfo
from .loaders import ImageEncoderLoader, ModelLoader, TextEncoderLoader, VAELoader
from .lora import LoraInfo, LoraLoader, LoraSave
from .memory import Memory, MemoryPlan
from .options import EasyCache, Guidance, LongRun, Schedule, TeaCache, WindowPrompts, Windows
from .sampler import LoadLatents, Sampler
from .speed import SpeedControl
from .text_encode import TextEncode
from .train import TrainLora, TrainModel
from .trained import LossPlot, TrainedWeights
from .training_data import TrainingDataNode
from .vace_encode import VaceEncode, VaceReferences
from .vae import VAEDecode, VAEEncode

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "WanCoreModelLoader": ModelLoader,
    "WanCoreTextEncoderLoader": TextEncoderLoader,
    "WanCoreVAELoader": VAELoader,
    "WanCoreImageEncoderLoader": ImageEncoderLoader,
    "WanCoreCheckpointInfo": CheckpointInfo,
    "WanCoreTextEncode": TextEncode,
    "WanCoreImageEncode": ImageEncode,
    "WanCoreControlEncode": ControlEncode,
    "WanCoreCameraPath": MovePath,
    "WanCoreCameraPathFile": RowsPath,
    "WanCoreCameraEncode": CameraEncode,
    "WanCoreVaceEncode": VaceEncode,
    "WanCoreVaceReferences": VaceReferences,
    "WanCoreSpeedControl": SpeedControl,
    "WanCoreLoraLoader": LoraLoader,
    "WanCoreLoraInfo": LoraInfo,
    "WanCoreLoraSave": LoraSave,
    "WanCoreTeaCache": TeaCache,
    "WanCoreEasyCache": EasyCache,
    "WanCoreWindows": Windows,
    "WanCoreWindowPrompts": WindowPrompts,
    "WanCoreGuidance": Guidance,
    "WanCoreSchedule": Schedule,
    "WanCoreLongRun": LongRun,
    "WanCoreMemory": Memory,
    "WanCoreMemoryPlan": MemoryPlan,
    "WanCoreSampler": Sampler,
    "WanCoreLoadLatents": LoadLatents,
    "WanCoreVAEEncode": VAEEncode,
    "WanCoreVAEDecode": VAEDecode,
    "WanCoreTrainingData": TrainingDataNode,
    "WanCoreTrainLora": TrainLora,
    "WanCoreTrainModel": TrainModel,
    "WanCoreLossPlot": LossPlot,
    "WanCoreTrainedWeights": TrainedWeights,
    "WanCoreFromConditioning": FromConditioning,
    "WanCoreToConditioning": ToConditioning,
    "WanCoreFromVAE": FromVAE,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "WanCoreModelLoader": "Load Model (WanCore)",
    "WanCoreTextEncoderLoader": "Load Text Encoder (WanCore)",
    "WanCoreVAELoader": "Load VAE (WanCore)",
    "WanCoreImageEncoderLoader": "Load Image Encoder (WanCore)",
    "WanCoreCheckpointInfo": "Checkpoint Info (WanCore)",
    "WanCoreTextEncode": "Prompt (WanCore)",
    "WanCoreImageEncode": "Image Encode (WanCore)",
    "WanCoreControlEncode": "Control Encode (WanCore)",
    "WanCoreCameraPath": "Camera Path (WanCore)",
    "WanCoreCameraPathFile": "Camera Path from Poses (WanCore)",
    "WanCoreCameraEncode": "Camera Encode (WanCore)",
    "WanCoreVaceEncode": "VACE Encode (WanCore)",
    "WanCoreVaceReferences": "VACE References (WanCore)",
    "WanCoreSpeedControl": "Speed Control (WanCore)",
    "WanCoreLoraLoader": "Load LoRA (WanCore)",
    "WanCoreLoraInfo": "LoRA Info (WanCore)",
    "WanCoreLoraSave": "Save LoRA (WanCore)",
    "WanCoreTeaCache": "TeaCache (WanCore)",
    "WanCoreEasyCache": "EasyCache (WanCore)",
    "WanCoreWindows": "Windows (WanCore)",
    "WanCoreWindowPrompts": "Window Prompts (WanCore)",
    "WanCoreGuidance": "Guidance (WanCore)",
    "WanCoreSchedule": "Schedule (WanCore)",
    "WanCoreLongRun": "Long Run (WanCore)",
    "WanCoreMemory": "Memory (WanCore)",
    "WanCoreMemoryPlan": "Memory Plan (WanCore)",
    "WanCoreSampler": "Sampler (WanCore)",
    "WanCoreLoadLatents": "Load Latents (WanCore)",
    "WanCoreVAEEncode": "VAE Encode (WanCore)",
    "WanCoreVAEDecode": "VAE Decode (WanCore)",
    "WanCoreTrainingData": "Training Data (WanCore)",
    "WanCoreTrainLora": "Train LoRA (WanCore)",
    "WanCoreTrainModel": "Train Model (WanCore)",
    "WanCoreLossPlot": "Loss Plot (WanCore)",
    "WanCoreTrainedWeights": "Trained Weights (WanCore)",
    "WanCoreFromConditioning": "Conditioning from ComfyUI (WanCore)",
    "WanCoreToConditioning": "Conditioning to ComfyUI (WanCore)",
    "WanCoreFromVAE": "VAE from ComfyUI (WanCore)",
}
