"""One change of the tiny model, written by hand in every dialect, independently of the code under test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.reference import tiny_dit
from wan_core.offload.streaming import place
from wan_core.offload.weights import WeightProvider

Factors = dict[str, tuple[Tensor, Tensor]]
"""`down` (r, in) and `up` (out, r) by module path."""

RANK = 4


def linear_paths(module: nn.Module, *endings: str) -> list[str]:
    """Paths of the linear layers of `module`; all of them, or those with these endings."""
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and (not endings or name.endswith(endings))
    ]


def factors(module: nn.Module, paths: list[str], rank: int = RANK, seed: int = 0, scale: float = 0.1) -> Factors:
    """Random factors for the linear layers at `paths`, large enough to change the output visibly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {}
    for path in paths:
        rows, columns = module.get_submodule(path).weight.flatten(1).shape
        made[path] = (draw(rank, columns) * columns**-0.5, draw(rows, rank) * scale)
    return made


@contextmanager
def streaming(dit: nn.Module) -> Iterator[nn.Module]:
    """`dit` with all of its blocks streamed."""
    provider = WeightProvider.of(dit)
    with provider.working(torch.device("cpu"), place(provider.inventory(dit.block_order()), parameters=0)):
        yield dit


def joined(path: str) -> str:
    return path.replace(".", "_")


def diffusers(path: str) -> str:
    """diffusers' path, spelled out for the layers that the tests use."""
    for ours, theirs in (
        ("self_attn", "attn1"), ("cross_attn", "attn2"), (".o", ".to_out.0"), (".q", ".to_q"),
        (".k_img", ".add_k_proj"), (".v_img", ".add_v_proj"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"), ("head.head", "proj_out"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ):  # fmt: skip
        if path.endswith(ours) or f"{ours}." in path:
            path = path.replace(ours, theirs, 1)
    for name in ("k", "v"):
        path = path.replace(f".attn1.{name}", f".attn1.to_{name}").replace(f".attn2.{name}", f".attn2.to_{name}")
    return path.replace("ffn.net.0.proj.net.0.proj", "ffn.net.0.proj")


def pairs(prefix: str, down: str, up: str, spell: Callable[[str], str] = str) -> Callable[[Factors], dict[str, Tensor]]:
    """A writer without alpha, which is that of most programs."""

    def write(made: Factors) -> dict[str, Tensor]:
        tensors = {}
        for path, (a, b) in made.items():
            tensors[f"{prefix}{spell(path)}.{down}"] = a.clone()
            tensors[f"{prefix}{spell(path)}.{up}"] = b.clone()
        return tensors

    return write


def with_alpha(
    prefix: str, spell: Callable[[str], str], down: str = "lora_down.weight", up: str = "lora_up.weight"
) -> Callable[[Factors], dict[str, Tensor]]:
    """A writer that keeps alpha 1 beside factors that are `rank` times larger, as kohya's trainers do by default."""

    def write(made: Factors) -> dict[str, Tensor]:
        tensors = {}
        for path, (a, b) in made.items():
            key = f"{prefix}{spell(path)}"
            tensors |= {f"{key}.{down}": a.clone(), f"{key}.{up}": b * a.shape[0], f"{key}.alpha": torch.tensor(1.0)}
        return tensors

    return write


AB = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")

WRITERS: dict[str, Callable[[Factors], dict[str, Tensor]]] = {
    "DiffSynth": pairs("", *DEFAULT),
    "DiffSynth, bare": pairs("", *AB),
    "DiffSynth, pipe.dit": pairs("pipe.dit.", *DEFAULT),
    "PEFT": pairs("base_model.model.", *AB),
    "PEFT, diffusers": pairs("base_model.model.", *AB, diffusers),
    "diffusers": pairs("transformer.", *AB, diffusers),
    "diffusers, bare": pairs("", *AB, diffusers),
    "diffusers, old": pairs("transformer.", "lora.down.weight", "lora.up.weight", diffusers),
    "PEFT in a pipeline": pairs("transformer.base_model.model.", *AB, diffusers),
    "kohya": with_alpha("lora_unet_", joined),
    "kohya, diffusers": with_alpha("lora_unet_", lambda path: joined(diffusers(path))),
    "VideoX-Fun": with_alpha("lora_unet__", joined),
    "OneTrainer": with_alpha("lora_transformer_", lambda path: joined(diffusers(path))),
    "LyCORIS": with_alpha("lycoris_", joined),
    "ComfyUI": pairs("diffusion_model.", *AB),
    "ComfyUI, down and up": with_alpha("diffusion_model.", str),
    "ComfyUI, whole model": pairs("model.diffusion_model.", *AB),
    "ai-toolkit": pairs("diffusion_model.", *AB),
    "LightX2V": pairs("diffusion_model.", *DOWN_UP),
}
"""Every way to write plain factors, in which the scale ends up 1."""


def trained_weights(folder: Path) -> dict[str, Path]:
    """Files for each shipped workflow that shows trained weights: a LoRA, and a whole model."""
    dit = tiny_dit("t2v")
    folder.mkdir(parents=True, exist_ok=True)
    lora, full = folder / "lora.safetensors", folder / "full.safetensors"
    save_file(WRITERS["kohya"](factors(dit, linear_paths(dit))), lora)
    save_file({name: tensor * 1.1 for name, tensor in dit.state_dict().items()}, full)
    return {"validate_lora": lora, "validate_full": full}
