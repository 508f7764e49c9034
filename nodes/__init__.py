"""The node classes by the ids that workflows save. Ids never change."""

from typing import Any

from .caches import EasyCache, FirstBlockCache, MagCache, TeaCache
from .camera import CameraEncode, MovePath, RowsPath, SpeedControl
from .conditioning import ControlEncode, ImageEncode, StartFrames, VaceEncode, VaceReferences
from .films import Extend, Keyframes, Segments
from .joints import DriftMeter, JoinClips
from .loaders import ImageEncoderLoader, TextEncoderLoader, VAELoader
from .lora import LoraInfo, LoraLoader, LoraSave
from .memory import CheckpointInfo, Memory, MemoryPlan, Parallel
from .model_loader import ModelLoader
from .native import FromConditioning, ToConditioning
from .options import Guidance, LongRun, Schedule, Windows
from .prompts import TextEncode, WindowPrompts
from .sampler import LoadLatents, Sampler
from .sockets import guard_sockets, mark_advanced
from .train import TrainLora, TrainModel
from .training_inputs import TrainingDataNode
from .training_results import LossPlot, TrainedWeights
from .vae import FromVAE, VAEDecode, VAEEncode

NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {
    "WanCoreModelLoader": ModelLoader,
    "WanCoreTextEncoderLoader": TextEncoderLoader,
    "WanCoreVAELoader": VAELoader,
    "WanCoreImageEncoderLoader": ImageEncoderLoader,
    "WanCoreCheckpointInfo": CheckpointInfo,
    "WanCoreTextEncode": TextEncode,
    "WanCoreImageEncode": ImageEncode,
    "WanCoreStartFrames": StartFrames,
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
    "WanCoreMagCache": MagCache,
    "WanCoreFirstBlockCache": FirstBlockCache,
    "WanCoreWindows": Windows,
    "WanCoreWindowPrompts": WindowPrompts,
    "WanCoreGuidance": Guidance,
    "WanCoreSchedule": Schedule,
    "WanCoreLongRun": LongRun,
    "WanCoreMemory": Memory,
    "WanCoreMemoryPlan": MemoryPlan,
    "WanCoreParallel": Parallel,
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
    "WanCoreExtend": Extend,
    "WanCoreKeyframes": Keyframes,
    "WanCoreSegments": Segments,
    "WanCoreJoinClips": JoinClips,
    "WanCoreDriftMeter": DriftMeter,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "WanCoreModelLoader": "Load Model (WanCore)",
    "WanCoreTextEncoderLoader": "Load Text Encoder (WanCore)",
    "WanCoreVAELoader": "Load VAE (WanCore)",
    "WanCoreImageEncoderLoader": "Load Image Encoder (WanCore)",
    "WanCoreCheckpointInfo": "Checkpoint Info (WanCore)",
    "WanCoreTextEncode": "Prompt (WanCore)",
    "WanCoreImageEncode": "Image Encode (WanCore)",
    "WanCoreStartFrames": "Start Frames (WanCore)",
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
    "WanCoreMagCache": "MagCache (WanCore)",
    "WanCoreFirstBlockCache": "First-Block Cache (WanCore)",
    "WanCoreWindows": "Windows (WanCore)",
    "WanCoreWindowPrompts": "Window Prompts (WanCore)",
    "WanCoreGuidance": "Guidance (WanCore)",
    "WanCoreSchedule": "Schedule (WanCore)",
    "WanCoreLongRun": "Long Run (WanCore)",
    "WanCoreMemory": "Memory (WanCore)",
    "WanCoreMemoryPlan": "Memory Plan (WanCore)",
    "WanCoreParallel": "Parallel (WanCore)",
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
    "WanCoreExtend": "Extend Film (WanCore)",
    "WanCoreKeyframes": "Keyframes (WanCore)",
    "WanCoreSegments": "Segments (WanCore)",
    "WanCoreJoinClips": "Join Clips (WanCore)",
    "WanCoreDriftMeter": "Drift Meter (WanCore)",
}

SEARCH_ALIASES: dict[str, tuple[str, ...]] = {
    "WanCoreModelLoader": (
        "wan model", "diffusion model loader", "unet", "checkpoint", "dit", "WanVideoModelLoader",
        "加载模型", "模型加载",
    ),
    "WanCoreTextEncoderLoader": ("umt5", "t5", "clip loader", "LoadWanVideoT5TextEncoder", "文本编码器"),
    "WanCoreVAELoader": ("wan vae", "autoencoder", "WanVideoVAELoader", "加载 VAE"),
    "WanCoreImageEncoderLoader": ("clip vision loader", "clip h", "image encoder", "LoadWanVideoClipTextEncoder"),
    "WanCoreCheckpointInfo": ("inspect model", "model details", "what is this file", "metadata"),
    "WanCoreTextEncode": (
        "text encode", "negative prompt", "clip text encode", "WanVideoTextEncode",
        "提示词", "文生视频",
    ),
    "WanCoreImageEncode": (
        "image to video", "i2v", "first last frame", "flf2v", "inpaint video", "inp", "WanImageToVideo",
        "WanFirstLastFrameToVideo", "WanFunInpaintToVideo", "WanVideoImageToVideoEncode",
        "图生视频", "首尾帧",
    ),
    "WanCoreStartFrames": (
        "ti2v", "image to video", "continue video", "first frame", "Wan22ImageToVideoLatent",
        "图生视频", "视频续写",
    ),
    "WanCoreControlEncode": (
        "fun control", "control video", "depth", "canny", "pose", "reference image", "WanFunControlToVideo",
        "控制视频", "姿态", "深度",
    ),
    "WanCoreCameraPath": ("camera motion", "pan", "zoom", "trajectory", "WanCameraEmbedding", "镜头", "运镜"),
    "WanCoreCameraPathFile": ("camera trajectory file", "poses", "realestate10k", "cameractrl"),
    "WanCoreCameraEncode": ("camera control", "fun camera", "plucker", "WanCameraImageToVideo", "镜头控制"),
    "WanCoreVaceEncode": (
        "vace", "video editing", "inpaint", "outpaint", "WanVaceToVideo", "WanVideoVACEEncode",
        "视频编辑", "局部重绘",
    ),
    "WanCoreVaceReferences": ("vace reference", "reference images", "subject", "batch references", "参考图"),
    "WanCoreSpeedControl": ("motion bucket", "motion speed", "motion strength", "speedcontrol", "运动速度"),
    "WanCoreLoraLoader": ("lora", "add lora", "LoraLoaderModelOnly", "WanVideoLoraSelect", "加载 LoRA"),
    "WanCoreLoraInfo": ("lora metadata", "inspect lora", "lora keys", "rank", "alpha"),
    "WanCoreLoraSave": ("convert lora", "merge lora", "resize lora", "extract lora"),
    "WanCoreTeaCache": ("tea cache", "step cache", "speed up", "faster", "skip steps", "WanVideoTeaCache", "加速"),
    "WanCoreEasyCache": (
        "easy cache", "step cache", "speed up", "faster", "skip steps", "WanVideoEasyCache",
        "加速",
    ),
    "WanCoreMagCache": ("mag cache", "step cache", "speed up", "faster", "skip steps", "WanVideoMagCache", "加速"),
    "WanCoreFirstBlockCache": (
        "first block cache", "FBCache", "DBCache", "step cache", "speed up", "faster", "skip steps", "加速",
    ),
    "WanCoreWindows": ("sliding window", "context windows", "long video", "WanVideoContextOptions", "长视频"),
    "WanCoreWindowPrompts": ("prompt schedule", "prompt travel", "multi prompt", "storyboard", "长视频", "分镜"),
    "WanCoreGuidance": (
        "cfg schedule", "cfg zero star", "guidance interval", "CFGZeroStar", "NAG", "normalized attention guidance",
        "negative prompt at cfg 1", "skip layer guidance", "SLG", "WanVideoNAG", "WanVideoSLG", "SkipLayerGuidanceDiT",
    ),
    "WanCoreSchedule": ("sigmas", "scheduler", "split steps", "start step", "WanVideoScheduler"),
    "WanCoreLongRun": ("checkpoint", "resume", "save latent", "autosave", "crash", "长视频", "断点续跑"),
    "WanCoreMemory": (
        "vram", "block swap", "offload", "low vram", "out of memory", "WanVideoBlockSwap",
        "显存", "低显存",
    ),
    "WanCoreSampler": (
        "wan sampler", "ksampler", "generate video", "text to video", "t2v", "WanVideoSampler",
        "采样", "文生视频",
    ),
    "WanCoreLoadLatents": ("load latent", "resume", "saved latents"),
    "WanCoreVAEEncode": ("video to latent", "vae encode tiled", "WanVideoEncode", "编码"),
    "WanCoreVAEDecode": ("latent to video", "vae decode tiled", "WanVideoDecode", "解码"),
    "WanCoreMemoryPlan": ("vram estimate", "will it fit", "out of memory", "budget", "显存估算"),
    "WanCoreParallel": ("multi gpu", "several cards", "two gpus", "xfuser", "ulysses", "cfg split", "多卡", "多显卡"),
    "WanCoreTrainingData": ("dataset", "captions", "metadata.csv", "finetune", "数据集"),
    "WanCoreTrainLora": ("lora training", "finetune", "trainer", "peft", "训练 LoRA"),
    "WanCoreTrainModel": ("full finetune", "training", "motion controller", "全量训练"),
    "WanCoreLossPlot": ("loss curve", "training chart", "tensorboard"),
    "WanCoreTrainedWeights": ("trained lora", "finetuned model", "checkpoint"),
    "WanCoreFromConditioning": ("native conditioning", "bridge", "CLIP Text Encode"),
    "WanCoreToConditioning": ("native conditioning", "bridge", "KSampler"),
    "WanCoreFromVAE": ("native vae", "bridge", "Load VAE"),
    "WanCoreExtend": (
        "continue video", "extend video", "long video", "infinite", "loop", "last frame", "svi", "WanVideoExtend",
    ),
    "WanCoreKeyframes": ("first last frame", "keyframe", "image at frame", "flf2v", "WanFirstLastFrameToVideo"),
    "WanCoreSegments": ("first last frame", "morph", "transition", "storyboard", "keyframes"),
    "WanCoreJoinClips": ("concat video", "merge clips", "combine", "image batch"),
    "WanCoreDriftMeter": ("colour drift", "color shift", "sharpness", "motion", "joint", "seam"),
}  # fmt: skip
"""Other words that a node is looked for by: the field's, and the names of nodes of other packs that do the same."""

_FIT = ("aspect", "too_short")
_TILES = ("tiled", "tile_height", "tile_width", "stride_height", "stride_width")
_STORAGE = ("dtype", "weights", "rest")
_TRAINING = (
    "adapter", "image_encoder", "batch_size", "gradient_accumulation_steps", "lr_scheduler", "warmup_steps",
    "mixed_precision", "use_gradient_checkpointing_offload", "save_steps", "validation_clips", "gpus", "flags",
)  # fmt: skip

ADVANCED: dict[str, tuple[str, ...]] = {
    "WanCoreModelLoader": (
        "download", *_STORAGE, "attention", "precision", "vace_module", "preset", "fp8_matmul", "torch_compile",
        "deterministic", "boundary",
    ),
    "WanCoreTextEncoderLoader": ("download", *_STORAGE),
    "WanCoreVAELoader": ("download", "dtype"),
    "WanCoreImageEncoderLoader": ("download", *_STORAGE),
    "WanCoreTextEncode": ("cache_on_disk",),
    "WanCoreImageEncode": (*_FIT, *_TILES, "size_rule"),
    "WanCoreStartFrames": ("aspect", *_TILES, "size_rule"),
    "WanCoreControlEncode": (*_FIT, *_TILES),
    "WanCoreVaceEncode": ("start", "end", "end_strength", *_FIT, *_TILES),
    "WanCoreCameraPath": ("origin", "mode"),
    "WanCoreSpeedControl": ("download",),
    "WanCoreLoraLoader": ("strength_curve", "blocks", "mode", "strength_low"),
    "WanCoreTeaCache": ("template", "start_step", "residual_on_cpu"),
    "WanCoreEasyCache": ("residual_on_cpu",),
    "WanCoreMagCache": ("threshold", "max_skips", "retention", "residual_on_cpu"),
    "WanCoreFirstBlockCache": ("threshold", "first_blocks", "start_step", "max_skips", "residual_on_cpu"),
    "WanCoreWindows": ("colour_limit",),
    "WanCoreGuidance": (
        "cfg_low", "nag_tau", "nag_alpha", "nag_end", "skip_blocks", "skip_scale", "skip_start", "skip_end",
    ),
    "WanCoreSampler": ("solver", "denoise", "cfg_mode", "cfg_low", "recommended", "more_motion"),
    "WanCoreVAEEncode": _TILES,
    "WanCoreVAEDecode": (*_TILES, "decoder"),
    "WanCoreTrainingData": ("frame_pick", "short_clip", "on_bad_sample", "dataset_repeat"),
    "WanCoreTrainLora": _TRAINING,
    "WanCoreTrainModel": _TRAINING,
    "WanCoreFromVAE": ("dtype",),
    "WanCoreExtend": ("colour_limit", "width", "height", *_TILES),
    "WanCoreKeyframes": ("aspect", *_TILES),
    "WanCoreSegments": ("aspect", *_TILES),
}  # fmt: skip
"""Widgets that most people never touch: the editor shows them when it is asked for a node's advanced inputs."""

for _id, _words in SEARCH_ALIASES.items():
    # ComfyUI reads the attribute from the class.
    guard_sockets(NODE_CLASS_MAPPINGS[_id]).SEARCH_ALIASES = list(_words)
for _id, _names in ADVANCED.items():
    mark_advanced(NODE_CLASS_MAPPINGS[_id], _names)
