"""Runs inside of ComfyUI's environment: largest differences between its Wan classes and ours, as JSON on the last line.

Arguments: the ComfyUI checkout, the pack's folder.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

COMFY, ROOT = sys.argv[1:3]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, COMFY)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.clip_vision  # noqa: E402
import comfy.ldm.wan.vae  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.text_encoders.t5  # noqa: E402
import torch  # noqa: E402
from comfy_extras import nodes_camera_trajectory, nodes_wan  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # noqa: E402
from torch import Tensor  # noqa: E402

import nodes as comfy_nodes  # noqa: E402

sys.path.append(ROOT)
import pack  # noqa: E402

pack.register()
from wan_core import bundled  # noqa: E402
from wan_core.conditioning.text import TextEncoder  # noqa: E402
from wan_core.conditioning.vace import append_input  # noqa: E402
from wan_core.model import VideoModel  # noqa: E402
from wan_core.models.config import WAN_21, DiTConfig, TextEncoderConfig  # noqa: E402
from wan_core.models.dit import WanDiT  # noqa: E402
from wan_core.models.text_encoder import UMT5Encoder  # noqa: E402
from wan_core.models.vae import WanVAE, denormalise  # noqa: E402
from wan_core.sampling.experts import Expert  # noqa: E402
from wan_core.settings import ScheduleSettings  # noqa: E402
from wan_core.types import Conditioning, Curve, VaceInput, VideoSize  # noqa: E402
from wan_core.variants import fit, match_variant  # noqa: E402
from wancore.nodes import native  # noqa: E402
from wancore.nodes.sampler import Sampler  # noqa: E402
from wancore.nodes.vae import FromVAE  # noqa: E402

SIZE = VideoSize(64, 48, 9)
F, H, W = SIZE.latent.shape
SIGMA = torch.tensor([0.6])
BASE = dict(dim=256, ffn_dim=512, num_layers=4)  # the widths of text, time and image tokens are fixed in ComfyUI
DITS = {
    "t2v": DiTConfig(**BASE),
    "i2v": DiTConfig(**BASE, in_channels=36, has_image_input=True),
    "flf2v": DiTConfig(**BASE, in_channels=36, has_image_input=True, image_positions=514),
    "control": DiTConfig(**BASE, in_channels=48, has_image_input=True),
    "control_ref": DiTConfig(**BASE, in_channels=48, has_image_input=True, has_reference=True),
    "i2v_a14b": DiTConfig(**BASE, in_channels=36),
    "camera": DiTConfig(**BASE, in_channels=32, has_image_input=True, camera_channels=24),
    "vace": DiTConfig(**BASE, vace_layers=(0, 2), vace_channels=96),
}
draws = torch.Generator().manual_seed(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=draws)


def embeddings(words: int = 20) -> Tensor:
    text = torch.zeros(1, 512, 4096)
    text[:, :words] = normal(1, words, 4096)
    return text


def filled(module_class, config):
    with torch.device("meta"):
        module = module_class(config)
    module.load_state_dict(bundled.state_dict(module), assign=True)
    return module.requires_grad_(False).eval()


class Pair:
    """The same weights in both: ComfyUI's own loader tells from them what the model is."""

    def __init__(self, config: DiTConfig) -> None:
        self.config, self.dit = config, filled(WanDiT, config)
        copy = {name: tensor.clone() for name, tensor in self.dit.state_dict().items()}
        self.patcher = comfy.sd.load_diffusion_model_state_dict(copy, model_options={"dtype": torch.float32})
        self.model = self.patcher.model

    def ours(self, cond: Conditioning, x: Tensor) -> Tensor:
        fitted = fit(cond, match_variant(self.config), self.config, "the model", SIZE)
        return self.dit(x, SIGMA * 1000, fitted)

    def theirs(self, conditioning: native.Native, x: Tensor) -> Tensor:
        """Velocity, all the way from CONDITIONING as their samplers take it."""
        text, values = conditioning[0]
        conds = self.model.extra_conds(cross_attn=text, noise=x, device=x.device, **values)
        inputs = {name: cond.cond for name, cond in conds.items()}
        return (x - self.model.apply_model(x, SIGMA, **inputs)) / SIGMA


def difference(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape and first.std() > 0.1, (first.shape, second.shape, first.std())
    return (first.float() - second.float()).abs().max().item()


def conditioning_of(kind: str) -> Conditioning:
    """What our nodes would make for a model of that kind."""
    cond = Conditioning(text=embeddings(), negative_text=embeddings(9))
    latents, tokens = (lambda: normal(1, 16, F, H, W)), normal(1, 257, 1280)
    known = torch.zeros(1, 4, F, H, W)
    known[:, :, 0] = 1
    first = latents()
    first[:, :, 1:] = 0
    pictures = {"mask": known, "image": latents()}
    if kind == "i2v_a14b":
        return cond.with_inputs("input_image", size=SIZE, slots=pictures)
    if kind == "i2v":
        return cond.with_inputs("input_image", size=SIZE, slots=pictures, image_tokens=tokens)
    if kind == "flf2v":
        known[:, -1, -1] = 1
        tokens = normal(1, 514, 1280)
        return cond.with_inputs("input_image", "end_image", size=SIZE, slots=pictures, image_tokens=tokens)
    if kind == "control":
        return cond.with_inputs("control_video", size=SIZE, slots={"control": latents()})
    if kind == "control_ref":
        slots = {"control": latents(), "first_frame": first}
        names = ("control_video", "input_image", "reference_image")
        return cond.with_inputs(*names, size=SIZE, slots=slots, image_tokens=tokens, reference=normal(1, 16, H, W))
    if kind == "control_ref_without":
        return cond.with_inputs("control_video", size=SIZE, slots={"control": latents()})
    if kind == "camera":
        rays = normal(1, 24, F, SIZE.height, SIZE.width)
        return cond.with_inputs(
            "input_image", "camera", size=SIZE, slots={"first_frame": first}, image_tokens=tokens, camera=rays
        )
    if kind == "vace":
        drawn = (normal(1, 64, F, H, W) > 0).float()
        video = VaceInput(context=torch.cat((normal(1, 32, F, H, W), drawn), 1), strength=Curve.of(0.7))
        shown = torch.cat((normal(1, 16, 1, H, W), torch.zeros(1, 80, 1, H, W)), 1)
        rest = torch.cat((normal(1, 32, F, H, W), drawn), 1)
        both = append_input((video,), VaceInput(context=torch.cat((shown, rest), 2), strength=Curve.of(1.2)), F)
        return cond.with_inputs("vace_video", "vace_reference_image", size=SIZE, vace=both)
    return cond


def models() -> dict[str, float]:
    """Our conditioning in both; and back again through their form of it."""
    found = {}
    for kind in (*DITS, "control_ref_without"):
        pair, cond = Pair(DITS[kind.removesuffix("_without")]), conditioning_of(kind)
        positive, negative, latent, trim = native.ToConditioning().convert(cond, SIZE.width, SIZE.height, 9)
        x = normal(*latent["samples"].shape)
        assert x.shape[2] == F + trim
        found[f"to_{kind}"] = difference(pair.ours(cond, x), pair.theirs(positive, x))
        found[f"to_{kind}_negative"] = difference(pair.ours(cond.negative(), x), pair.theirs(negative, x))
        (back,) = native.FromConditioning().convert(positive, negative)
        found[f"back_{kind}"] = difference(pair.ours(cond, x), pair.ours(back, x))
    return found


class Latents:
    """A VAE as ComfyUI's Wan nodes use it, which encodes at once."""

    latent_channels = 16

    def encode(self, pixels: Tensor) -> Tensor:
        frames, height, width, _ = pixels.shape
        if pixels.std() == 0:  # what a VAE makes of grey is not zero either
            return denormalise(torch.full((1, 16, (frames - 1) // 4 + 1, height // 8, width // 8), 0.3), WAN_21)
        return denormalise(normal(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8), WAN_21)

    def spacial_compression_encode(self) -> int:
        return 8


def clip_vision(tokens: Tensor) -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output.penultimate_hidden_states = tokens
    return output


def native_nodes() -> dict[str, float]:
    """What ComfyUI's Wan nodes make, in both."""
    sizes = dict(width=SIZE.width, height=SIZE.height, length=9, batch_size=1)
    vae, tokens, picture = Latents(), clip_vision(normal(1, 257, 1280)), torch.rand(1, 50, 60, 3)
    other, clip = clip_vision(normal(1, 257, 1280)), torch.rand(9, 48, 64, 3)
    (rays, *_) = nodes_camera_trajectory.WanCameraEmbedding.execute("Pan Left", 64, 48, 9).args
    wan = nodes_wan
    calls = {
        "i2v": (wan.WanImageToVideo, dict(start_image=picture, clip_vision_output=tokens)),
        "flf2v": (
            wan.WanFirstLastFrameToVideo,
            dict(start_image=picture, end_image=picture, clip_vision_start_image=tokens, clip_vision_end_image=other),
        ),
        "control": (wan.WanFunControlToVideo, dict(start_image=picture, control_video=clip, clip_vision_output=tokens)),
        "control_ref": (wan.Wan22FunControlToVideo, dict(ref_image=picture, control_video=clip)),
        "camera": (
            wan.WanCameraImageToVideo, dict(start_image=picture, clip_vision_output=tokens, camera_conditions=rays),
        ),
        "vace": (wan.WanVaceToVideo, dict(strength=0.8, control_video=clip, reference_image=picture)),
        "vace_plain": (wan.WanVaceToVideo, dict(strength=1.0, control_video=clip, control_masks=torch.ones(9, 48, 64))),
        "vace_kept": (wan.WanVaceToVideo, dict(strength=1.0, control_video=clip, control_masks=torch.zeros(9, 48, 64))),
    }  # fmt: skip
    found = {}
    for kind, (node, inputs) in calls.items():
        text = ([[embeddings(), {"pooled_output": None}]], [[embeddings(7), {"pooled_output": None}]])
        positive, negative, latent, *trim = node.execute(*text, vae, **sizes, **inputs).args
        if kind == "control_ref":
            # Image tokens are on this node's own socket; ComfyUI's model has no meaning for their absence.
            (cond,) = native.FromConditioning().convert(positive, negative, tokens)
            positive[0][1]["clip_vision_output"] = tokens
        else:
            (cond,) = native.FromConditioning().convert(positive, negative)
        assert cond.size == SIZE, cond.size
        pair, x = Pair(DITS[kind.partition("_plain")[0].partition("_kept")[0]]), normal(*latent["samples"].shape)
        assert cond.prefix_frames(F) == (trim[0] if trim else 0)
        found[f"from_{kind}"] = difference(pair.ours(cond, x), pair.theirs(positive, x))
    return found


def vae() -> dict[str, float]:
    mine = filled(WanVAE, bundled.VAE)
    theirs = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    theirs.load_state_dict(mine.state_dict())
    (adopted,) = FromVAE().convert(SimpleNamespace(get_sd=theirs.state_dict))
    pixels, latents = torch.rand(1, 3, 9, 48, 64) * 2 - 1, normal(1, 16, 3, 6, 8)
    pairs = {}
    for name, own in (("vae", mine), ("adopted_vae", adopted)):
        pairs[f"{name}_encode"] = difference(denormalise(own.encode(pixels), WAN_21), theirs.encode(pixels))
        pairs[f"{name}_decode"] = difference(
            own.decode(latents), theirs.decode(denormalise(latents, WAN_21)).clamp(-1, 1)
        )
    return pairs


def umt5() -> dict[str, float]:
    """Their embeddings of tokens with weights of ours, by way of a checkpoint in their layout."""
    c: TextEncoderConfig = bundled.TEXT_ENCODER
    theirs = comfy.sd1_clip.SDClipModel(
        device="cpu", layer="last", dtype=torch.float32, special_tokens={"end": 1, "pad": 0},
        model_class=comfy.text_encoders.t5.T5, enable_attention_masks=True, zero_out_masked=True,
        textmodel_json_config={
            "d_ff": c.ffn_dim, "d_kv": c.attention_dim // c.num_heads, "d_model": c.dim, "num_heads": c.num_heads,
            "num_layers": c.num_layers, "vocab_size": c.vocab_size, "dense_act_fn": "gelu_pytorch_tanh",
            "is_gated_act": True, "model_type": "umt5",
        },
    )  # fmt: skip
    mine = filled(UMT5Encoder, c)
    names = {
        "token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight",
        "norm1.weight": "layer.0.layer_norm.weight", "norm2.weight": "layer.1.layer_norm.weight",
        "attn.q.weight": "layer.0.SelfAttention.q.weight", "attn.k.weight": "layer.0.SelfAttention.k.weight",
        "attn.v.weight": "layer.0.SelfAttention.v.weight", "attn.o.weight": "layer.0.SelfAttention.o.weight",
        "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
        "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
        "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
        "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    }  # fmt: skip
    renamed = {}
    for name, tensor in mine.state_dict().items():
        block, _, rest = name.partition(".")[2].partition(".") if name.startswith("blocks.") else ("", "", name)
        renamed[f"encoder.block.{block}.{names[rest]}" if block else names[rest]] = tensor
    missing, unexpected = theirs.transformer.load_state_dict(renamed, strict=False)
    assert not unexpected and {name.partition(".")[0] for name in missing} <= {"encoder"}, (missing, unexpected)
    with tempfile.TemporaryDirectory() as folder:
        bundled.write_tokenizer(Path(folder) / bundled.TOKENIZER_FILE)
        from wan_core.conditioning.text import Tokenizer

        encoder = TextEncoder(mine, Tokenizer.from_folder(folder))
    prompt = "a dog is running over the green field"
    (ids,) = encoder._ids([prompt]).values()
    padded = [(int(i), 1.0) for i in ids] + [(0, 1.0)] * (512 - len(ids))
    embedded, *_ = theirs.encode_token_weights([padded])
    return {"umt5": difference(encoder.encode([prompt]), embedded)}


STEPS, SPLIT, SHIFT, CFG = 4, 2, 5.0, 3.0  # 4 steps at this shift: two of each expert


class Experts:
    """A pair, and its runs by either side's samplers: our one sampler, and two KSampler (Advanced)."""

    def __init__(self, kind: str) -> None:
        self.pairs = [Pair(DITS[kind]), Pair(DITS[kind])]
        low = self.pairs[1]
        for parameter in (*low.dit.parameters(), *low.model.diffusion_model.parameters()):
            parameter.data.mul_(1.05)
        experts = tuple(Expert(pair.dit, lowest) for pair, lowest in zip(self.pairs, (875.0, 0.0), strict=True))
        self.whole = VideoModel(experts, match_variant(DITS[kind]), None, "the pair", deterministic=True)
        self.cond = conditioning_of(kind)
        self.native = native.ToConditioning().convert(self.cond, SIZE.width, SIZE.height, 9)

    def ours(
        self, steps: range, latent: dict[str, Tensor] | None = None, expert: int | None = None
    ) -> dict[str, Tensor]:
        model = self.whole if expert is None else replace(self.whole, experts=(Expert(self.pairs[expert].dit),))
        end = None if steps.stop == STEPS else steps.stop
        schedule = ScheduleSettings(start_step=steps.start, end_step=end)
        sizes = dict(width=SIZE.width, height=SIZE.height, num_frames=9)
        return Sampler().sample(
            model, self.cond, 3, STEPS, CFG, SHIFT, "euler", **sizes, latent=latent, schedule=schedule
        )[0]  # fmt: skip

    def theirs(self, expert: int, steps: range, latent: dict[str, Tensor]) -> dict[str, Tensor]:
        (shifted,) = ModelSamplingSD3().patch(self.pairs[expert].patcher, SHIFT)
        positive, negative, *_ = self.native
        is_first, is_last = steps.start == 0, steps.stop == STEPS
        return comfy_nodes.KSamplerAdvanced().sample(
            shifted, "enable" if is_first else "disable", 3, STEPS, CFG, "euler", "simple", positive, negative, latent,
            steps.start, steps.stop, "disable" if is_last else "enable",
        )[0]  # fmt: skip


def leftover_noise() -> dict[str, float]:
    """Runs whose first steps one side takes and whose last steps the other, beside an unbroken one of ours."""
    found = {}
    for kind in ("t2v", "i2v_a14b"):
        pair, high, low = Experts(kind), range(SPLIT), range(SPLIT, STEPS)
        empty = {"samples": torch.zeros(1, 16, F, H, W)}
        expected = pair.ours(range(STEPS))["samples"]
        native_high, our_high = pair.theirs(0, high, empty), pair.ours(high, expert=0)
        plain = {"samples": our_high["samples"]}  # as it is after a save, or a node that copies the latents alone
        runs = {
            "native": pair.theirs(1, low, native_high),
            "native_then_ours": pair.ours(low, native_high, expert=1),
            "native_then_pair": pair.ours(low, native_high),
            "ours_then_native": pair.theirs(1, low, our_high),
            "ours_then_ours": pair.ours(low, plain, expert=1),
        }
        found |= {f"{name}_{kind}": difference(run["samples"], expected) for name, run in runs.items()}
    return found


with torch.no_grad():
    print(json.dumps(models() | native_nodes() | vae() | umt5() | leftover_noise()))
