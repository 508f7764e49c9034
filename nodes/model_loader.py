"""The loader of video models: one transformer, or two experts as one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from wan_core import catalog
from wan_core.loading.detect import Component, join_vace
from wan_core.loading.download import OnProgress
from wan_core.loading.pairs import check_pair, find_pairs
from wan_core.model import VideoModel
from wan_core.model_files import DiTSettings, experts_of, inspect, load_dit, recommended_row
from wan_core.models.attention import BACKENDS
from wan_core.models.config import DiTConfig
from wan_core.offload.formats import WeightChoice
from wan_core.planning.modules import SizedExpert, published_dit
from wan_core.runtime import log
from wan_core.variants import match_variant

from . import host, places, planning, sockets
from .loaders import AUTO, NONE, STORAGE_INPUTS, Loader, choose_dtype, offload_of

SIZES = {
    "Wan-AI/Wan2.1-T2V-1.3B": "2.8 GB",
    "Wan-AI/Wan2.1-T2V-14B": "28.6 GB",
    "Wan-AI/Wan2.1-I2V-14B-480P": "32.8 GB",
    "Wan-AI/Wan2.1-I2V-14B-720P": "32.8 GB",
    "Wan-AI/Wan2.1-FLF2V-14B-720P": "32.8 GB",
    "PAI/Wan2.1-Fun-1.3B-InP": "3.1 GB",
    "PAI/Wan2.1-Fun-14B-InP": "32.8 GB",
    "PAI/Wan2.1-Fun-1.3B-Control": "3.1 GB",
    "PAI/Wan2.1-Fun-14B-Control": "32.8 GB",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control": "3.1 GB",
    "PAI/Wan2.1-Fun-V1.1-14B-Control": "32.8 GB",
    "PAI/Wan2.1-Fun-V1.1-1.3B-InP": "3.1 GB",
    "PAI/Wan2.1-Fun-V1.1-14B-InP": "32.8 GB",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera": "3.2 GB",
    "PAI/Wan2.1-Fun-V1.1-14B-Control-Camera": "33.8 GB",
    "iic/VACE-Wan2.1-1.3B-Preview": "4.3 GB",
    "Wan-AI/Wan2.1-VACE-1.3B": "4.3 GB",
    "Wan-AI/Wan2.1-VACE-14B": "34.7 GB",
    "Wan-AI/Wan2.2-T2V-A14B": "2 × 28.6 GB",
    "Wan-AI/Wan2.2-I2V-A14B": "2 × 28.6 GB",
    "Wan-AI/Wan2.2-TI2V-5B": "10.0 GB",
    "PAI/Wan2.2-Fun-A14B-InP": "2 × 28.6 GB",
    "PAI/Wan2.2-Fun-A14B-Control": "2 × 28.6 GB",
    "PAI/Wan2.2-Fun-A14B-Control-Camera": "2 × 29.6 GB",
    "PAI/Wan2.2-VACE-Fun-A14B": "2 × 34.7 GB",
    "PAI/Wan2.2-Fun-5B-InP": "10.0 GB",
    "PAI/Wan2.2-Fun-5B-Control": "10.0 GB",
    "PAI/Wan2.2-Fun-5B-Control-Camera": "10.5 GB",
}
"""Of the weights of published models in bf16; some files hold them in float32, twice as large."""


class ModelLoader(Loader):
    """A Wan DiT."""

    INPUT, KIND, FOLDER = "model", "dit", "diffusion_models"
    ROWS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        row.model_id: row.files for row in (*catalog.CATALOG, *catalog.TINY_ROWS) if not row.base
    }
    SIZES = SIZES
    DESCRIPTION = (
        "Load a Wan video model: one file, or both experts of a Wan 2.2 A14B model as one. Its inputs are read from "
        "its tensors; the name only chooses recommended settings."
    )
    RETURN_TYPES = (sockets.MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The video model, for the sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        listed, shared = cls.shared_inputs("The video model")
        own = {
            "attention": sockets.choice(
                list(BACKENDS),
                "auto",
                "Attention kernel. auto: the fastest exact one on this machine, measured in the first step; sdpa: "
                "PyTorch's choice. The others need their package installed.",
            ),
            "precision": sockets.choice(
                ["fast", "exact"], "fast", "exact keeps the residual stream in float32, as the authors do: more memory."
            ),
            "vace_module": sockets.choice(
                [NONE, *host.current.list_files(cls.FOLDER)],
                NONE,
                "A VACE branch from a separate file, for a T2V model of the same size.",
            ),
            "preset": sockets.choice(
                [AUTO, *cls.ROWS],
                AUTO,
                "The checkpoint whose recommended settings are used; auto chooses by structure and file name.",
            ),
            "weights": STORAGE_INPUTS["weights"],
            "fp8_matmul": sockets.flag(
                False, "Multiply FP8 weights as FP8 numbers: faster on Ada, Hopper and newer cards, and less exact."
            ),
            "rest": STORAGE_INPUTS["rest"],
            "torch_compile": sockets.flag(
                False,
                "Fuse elementwise operations with torch.compile: a few percent faster on a card, after some seconds of "
                "compiling for each new size.",
            ),
            "deterministic": sockets.flag(
                False,
                "Compute with fixed kernels instead of those that were measured as fastest: the same bits on equal "
                "machines. Otherwise only this machine repeats a video bit for bit.",
            ),
            "boundary": sockets.number(
                -1.0,
                -1.0,
                1.0,
                "Of a model of two experts: the fraction of the noise below which the second one works. -1: as its "
                "authors recommend.",
                step=0.005,
            ),
        }
        return {"required": listed, "optional": {**shared, **own}}

    @classmethod
    def local(cls) -> list[str]:
        """Pairs of files under one name, and files, each of which loads alone too."""
        files = host.current.list_files(cls.FOLDER)
        return [*find_pairs(files), *files]

    @classmethod
    def files(cls, name: str, download: bool, on_download: OnProgress | None = None) -> list[list[Path]]:
        pair = () if name in cls.ROWS else find_pairs(host.current.list_files(cls.FOLDER)).get(name, ())
        return [[places.model_file(cls.FOLDER, part)] for part in pair] or super().files(name, download, on_download)

    @classmethod
    def inspected(cls, found: list[list[Path]]) -> list[Component]:
        components = super().inspected(found)
        if len(components) == 2:
            check_pair(*components)
        return components

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool | str:
        return cls.check(model, True)

    @classmethod
    def CHECK_INPUTS(cls, model: str, download: bool = False) -> bool | str:
        return cls.check(model, download)

    @classmethod
    def IS_CHANGED(cls, model: str, download: bool = False, **_: Any) -> str:
        return cls.fingerprint(model, download)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The bundled model of the same structure."""
        row = catalog.find_row(inputs.get("model", ""))
        return {"model": row.tiny_id if row else catalog.TINY, "download": False, "vace_module": NONE}

    @classmethod
    def published(cls, name: str) -> list[Component]:
        row = catalog.find_row(name)
        assert row is not None, "ROWS are those of the catalog"
        return [published_dit(row, number) for number in range(len(row.files))]

    @classmethod
    def plan_outputs(
        cls, model: str, vace_module: str = NONE, preset: str = AUTO, boundary: float = -1.0, **inputs: Any
    ) -> tuple[planning.PlannedModel]:
        found = cls.describe(model)
        if vace_module != NONE:
            branch = inspect(places.model_file(cls.FOLDER, vace_module), "vace")
            found = [(join_vace(component, branch), absent) for component, absent in found]
        files = experts_of([component for component, _ in found], *_chosen(boundary, preset))
        experts = []
        for file, (component, absent) in zip(files, found, strict=True):
            dit = planning.plan_module(component, absent, **inputs)
            experts.append(SizedExpert(dit.module, dit.absent, lowest=file.lowest))
        first, chosen = files[0].component, _chosen(boundary, preset)[1]
        variant = match_variant(first.config_of(DiTConfig))
        row = catalog.find_row(chosen or model) or recommended_row(first, variant, len(files) > 1 or None)
        return (planning.PlannedModel(model, variant, tuple(experts), row=row),)

    def load(
        self,
        model: str,
        dtype: str = "auto",
        download: bool = False,
        attention: str = "auto",
        precision: str = "fast",
        vace_module: str = NONE,
        preset: str = AUTO,
        weights: WeightChoice = "auto",
        fp8_matmul: bool = False,
        rest: str = "memory",
        torch_compile: bool = False,
        deterministic: bool = False,
        boundary: float = -1.0,
    ) -> tuple[VideoModel]:
        components = self.components(model, download)
        vace = None
        if vace_module != NONE:
            vace = inspect(places.model_file(self.FOLDER, vace_module), "vace")
        settings = DiTSettings(
            dtype=choose_dtype(dtype, components[0]),
            attention=attention,
            exact=precision == "exact",
            fp8_matmul=fp8_matmul,
            torch_compile=torch_compile,
            deterministic=deterministic,
        )
        boundary_or_none, row = _chosen(boundary, preset)
        experts = experts_of(components, boundary_or_none, row)
        offload, device = offload_of(weights, rest), host.current.device()
        made = load_dit(experts, settings, offload, vace=vace, preset=row, compute_device=device)
        if made.row is not None:
            log.info("%s recommends %s.", made.row.model_id, recommended(made.row.preset))
        return (made,)


def recommended(preset: catalog.Preset) -> str:
    """The authors' settings in one line."""
    low = "" if preset.cfg_low is None else f" (low noise {preset.cfg_low:g})"
    size = f"{preset.width}x{preset.height}, {preset.num_frames} frames"
    return f"{preset.steps} steps, cfg {preset.cfg:g}{low}, shift {preset.shift:g}, {preset.solver}, {size}"


def _chosen(boundary: float, preset: str) -> tuple[float | None, str | None]:
    """The widgets as `experts_of` takes them: None where they leave a choice."""
    return (None if boundary < 0 else boundary), (None if preset == AUTO else preset)
