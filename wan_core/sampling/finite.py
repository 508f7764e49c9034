"""Numbers that stopped being numbers: found where they arise, and explained, before they become a black video."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.dit import TokenState, WanDiT
from ..types import Conditioning, StepInfo, tensors_in


class NonFiniteError(ValueError):
    """NaN or infinity where numbers should be. The message names the place and the likely cause."""


def is_finite(x: Tensor) -> bool:
    """Whether every value of `x` is a number; waits for the device. On the meta device there are no values."""
    return x.is_meta or bool(torch.isfinite(x).all())


def check_latents(latents: Tensor, when: str) -> None:
    """Raise NonFiniteError when latents (B, 16, F, h, w) hold anything but numbers; `when` says where, in words."""
    if not is_finite(latents):
        bad = 100 * (~torch.isfinite(latents)).double().mean().item()
        raise NonFiniteError(
            f"{bad:.3g}% of the latents are NaN or infinite {when}; the video would be black. Load the "
            "model in bf16 or fp32, or lower cfg, VACE strength or LoRA strength, and sample again."
        )


def check_pixels(pixels: Tensor) -> None:
    """Raise NonFiniteError when decoded pixels (B, 3, T, H, W) hold anything but numbers."""
    if not is_finite(pixels):
        bad = 100 * (~torch.isfinite(pixels)).double().mean().item()
        raise NonFiniteError(
            f"{bad:.3g}% of the decoded pixels are NaN or infinite, though the latents are not: the VAE's weights are "
            "broken, or a value is beyond 65504 in fp16. Check its file, or load the VAE in bf16 or fp32."
        )


def locate(dit: WanDiT, x: Tensor, cond: Conditioning, states: Sequence[TokenState], info: StepInfo) -> NonFiniteError:
    """What to raise for a step whose velocity is not finite: `states` are its tokens, embedded anew.

    The step is run once more, looking at the tokens before every block.
    """
    step = f"step {info.index + 1} of {info.total}"
    if not is_finite(x):
        return NonFiniteError(f"The latents were NaN or infinite before {step}: the noise or the latent input is bad.")
    if not all(is_finite(tensor) for tensor in tensors_in(cond)):
        return NonFiniteError(
            f"The conditioning holds NaN or infinity before {step}: the text encoder or an input image overflowed; "
            "load the text encoder in bf16 or fp32."
        )
    bad = [name for name, weight in dit.named_parameters() if not is_finite(weight)]
    if bad:
        return NonFiniteError(
            f"{len(bad)} weights of the model hold NaN or infinity, the first is {bad[0]}: the file, a LoRA or a "
            "conversion is broken."
        )
    place = "the embedding of the latents"
    if all(is_finite(state.tokens) for state in states):
        place = _first_bad_block(dit, states)
    likely = "a value beyond 65504 in fp16; load the model in bf16, or with precision exact"
    if dit.dtype != torch.float16:
        likely = "too strong a cfg, VACE strength or LoRA, or an attention kernel that fails here; try sdpa"
    return NonFiniteError(f"The model gave NaN or infinity in {step}, first after {place}. Likely cause: {likely}.")


def _first_bad_block(dit: WanDiT, states: Sequence[TokenState]) -> str:
    found: list[int] = []

    def look(index: int) -> None:
        if not found and not all(is_finite(state.tokens) for state in states):
            found.append(index - 1)

    dit.run_blocks(states, look)
    look(len(dit.blocks))
    return f"block {found[0]} of 0 to {len(dit.blocks) - 1}" if found else "the output head"
