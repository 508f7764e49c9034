"""The node classes by the ids that workflows save. Ids never change."""

from .loaders import ModelLoader, TextEncoderLoader, VAELoader
from .sampler import Sampler
from .text_encode import TextEncode
from .vae import VAEDecode, VAEEncode

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "WanCoreModelLoader": ModelLoader,
    "WanCoreTextEncoderLoader": TextEncoderLoader,
    "WanCoreVAELoader": VAELoader,
    "WanCoreTextEncode": TextEncode,
    "WanCoreSampler": Sampler,
    "WanCoreVAEEncode": VAEEncode,
    "WanCoreVAEDecode": VAEDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "WanCoreModelLoader": "Load Model (WanCore)",
    "WanCoreTextEncoderLoader": "Load Text Encoder (WanCore)",
    "WanCoreVAELoader": "Load VAE (WanCore)",
    "WanCoreTextEncode": "Prompt (WanCore)",
    "WanCoreSampler": "Sampler (WanCore)",
    "WanCoreVAEEncode": "VAE Encode (WanCore)",
    "WanCoreVAEDecode": "VAE Decode (WanCore)",
}
