"""The handle of a video model, which hides how many transformers it has and where their weights are."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from . import catalog, magnitudes
from .cache_settings import CacheSettings, MagCacheSettings
from .checks import check_number
from .distilled import FewSteps, names_of
from .loading.pairs import resolve_pair, side_notes
from .loading.tensor_files import read_header
from .lora.apply import LoraMode, LoraRun, LoraUse, apply_loras
from .lora.bind import EVERYWHERE, BlockStrengths
from .lora.read import Lora
from .lora.report import LoraReport
from .lora.target import MODEL_BLOCKS, Target, lora_report, use_lora
from .models import kernels
from .models.config import DiTConfig, Geometry
from .models.dit import WanDiT
from .models.layers import MotionController
from .offload.blocks import available_ram, weight_bytes
from .offload.read_ahead import ReadAhead
from .offload.streaming import Placement
from .offload.weights import WeightProvider
from .parallel.cards import Cards, FilmRequest
from .parallel.source import Source
from .parallel.tasks import FollowFilm
from .planning.encoders import limit_memory
from .planning.run import RunPlan, plan_on
from .recommend import after_first_step, few_steps_for, few_steps_of, recommended_settings, resolved_cache
from .runtime import Runtime
from .sampling.checkpoint import Checkpoint, RunState
from .sampling.experts import Activate, Active, Expert, RunInputs, RunModel
from .sampling.parallel import follow, sharing
from .sampling.run import sample
from .sampling.solvers import NUM_TRAIN_TIMESTEPS
from .sampling.windows import continuing
from .settings import MemorySettings, SamplerSettings
from .types import Conditioning, Curve, VideoSize
from .variants import Variant, fit

log = logging.getLogger("wancore")

PathLike = str | Path


@dataclass(frozen=True)
class VideoModel:
    """A video model: its transformers, what is known of them, and the one way to run them.

    Attributes:
        experts: transformers of equal structure, each for a range of noise levels, the noisiest first; most models
            have one. A run leaves their weights as they were.
        variant: the row of their structure.
        row: the catalog row whose settings are recommended, if their name or structure points to one.
        name: what to call the model in messages.
        motion_controller: the speed-control adapter that was loaded beside them.
        deterministic: runs use the default kernels.
        source: how other processes load it.
        cards: the group of processes that runs it in place of this one.
    """

    experts: tuple[Expert, ...]
    variant: Variant
    row: catalog.CatalogRow | None
    name: str
    motion_controller: MotionController | None = None
    deterministic: bool = False
    source: Source | None = field(default=None, repr=False, compare=False)
    cards: Cards | None = None

    @classmethod
    def of(
        cls,
        dit: WanDiT,
        variant: Variant,
        row: catalog.CatalogRow | None,
        name: str,
        motion_controller: MotionController | None = None,
        *,
        deterministic: bool = False,
    ) -> "VideoModel":
        """A model with one transformer."""
        return cls((Expert(dit),), variant, row, name, motion_controller, deterministic)

    @property
    def dit(self) -> WanDiT:
        """The first transformer with its weights, for code that trains a module or replaces its weights."""
        return self.expert_dit(0)

    def expert_dit(self, number: int) -> WanDiT:
        """The transformer of that expert with its weights, which are read first if no run has needed them yet, and stay
        in memory from then on."""
        dit = self.experts[number].dit
        WeightProvider.of(dit).read(keep=True)
        return dit

    @property
    def boundary(self) -> float | None:
        """The fraction of the noise, 0 to 1, from which on the first of two experts works; None for one expert."""
        return self.experts[0].lowest / NUM_TRAIN_TIMESTEPS if len(self.experts) == 2 else None

    def with_boundary(self, boundary: float) -> "VideoModel":
        """A handle on the same weights whose first expert takes the steps from timestep 1000 * `boundary` on: all steps
        with 0, none with more than 1.

        Raises:
            ValueError: the model has one expert, or `boundary` is below 0 or above 2.
        """
        check_number("switch_DiT_boundary", boundary, low=0, high=2)
        if len(self.experts) != 2:
            raise ValueError(f"switch_DiT_boundary is for models of two experts; {self.name} has {len(self.experts)}.")
        first, second = self.experts
        return replace(self, experts=(replace(first, lowest=boundary * NUM_TRAIN_TIMESTEPS), second))

    @property
    def config(self) -> DiTConfig:
        """The structure that all experts share."""
        return self.experts[0].dit.config

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.experts[0].dit.dtype

    @property
    def loras(self) -> tuple[LoraUse, ...]:
        """The LoRAs of all experts, each once."""
        return tuple(dict.fromkeys(use for expert in self.experts for use in expert.loras))

    @property
    def geometry(self) -> Geometry:
        """Of its videos and latents."""
        return self.config.geometry

    @property
    def few_steps(self) -> FewSteps | None:
        """What the authors of the distilled LoRA on it, or else of the checkpoint, recommend; None if neither is known
        as distilled.
        """
        files = self.experts[0].files[:1]
        metadata: Mapping[str, str] = {}
        with suppress(ValueError):  # the file is gone, but its weights are here
            metadata = read_header(files).metadata if files else {}
        return few_steps_of(self.loras, names_of(files[0].resolve()) if files else [self.name], metadata)

    def recommended(
        self, choice: str, settings: SamplerSettings, *, more_motion: bool = False
    ) -> tuple["VideoModel", SamplerSettings]:
        """The model and the settings for a run as `choice` says: `off` as they are, `auto` with the recommended steps,
        shift, cfg, solver and noise levels, or with those of a row of `distilled.FEW_STEPS`, by its name.

        Args:
            more_motion: of few-step settings, guidance and no distilled LoRA in the first step.

        Raises:
            ValueError: nothing is known to recommend, or `more_motion` has no few-step settings to change.
        """
        row = few_steps_for(choice, self.few_steps)
        settings = recommended_settings(choice, settings, row, self.row, self.name, more_motion)
        if not more_motion:
            return self, settings
        experts = tuple(after_first_step(each, settings.total_steps) for each in self.experts)
        return replace(self, experts=experts), settings

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules; a LoRA may change any of them."""
        return (*(expert.dit for expert in self.experts), *self._beside)

    @property
    def _beside(self) -> tuple[nn.Module, ...]:
        return () if self.motion_controller is None else (self.motion_controller,)

    def with_lora(
        self,
        source: PathLike | Lora,
        *,
        strength: float | Sequence[float] | Curve = 1.0,
        blocks: BlockStrengths = EVERYWHERE,
        mode: LoraMode = "auto",
        expert: int | None = None,
    ) -> tuple["VideoModel", LoraReport]:
        """A handle on the same weights with one more LoRA, or checkpoint of trained weights; and what that does.

        Args:
            expert: the number of the expert that it is applied to; None is every one.

        Raises:
            ValueError: the file cannot be read, nothing in it matches, it was made for another size, or a setting is
                wrong.
        """
        target = self.target(expert or 0)
        use = use_lora(source, target, strength=strength, blocks=blocks, mode=mode)
        report = lora_report(use, target, self.experts[expert or 0].loras)
        name = source.name if isinstance(source, Lora) else source
        report = replace(report, notes=(*report.notes, *side_notes(name, expert, len(self.experts))))
        changed = tuple(
            replace(each, loras=(*each.loras, use)) if expert in (None, number) else each
            for number, each in enumerate(self.experts)
        )
        return replace(self, experts=changed), report

    def with_lora_pair(
        self,
        source: PathLike | Sequence[PathLike],
        *,
        strengths: tuple[float | Sequence[float] | Curve, float | Sequence[float] | Curve] = (1.0, 1.0),
        blocks: BlockStrengths = EVERYWHERE,
        mode: LoraMode = "auto",
    ) -> tuple["VideoModel", tuple[LoraReport, LoraReport]]:
        """A handle on the same weights with a LoRA for each of two experts, and what these do.

        Args:
            source: what holds the two files: a folder, a name with braces, a list, or one of them, beside which the
                other one is (`loading.pairs`).
            strengths: of the one for high noise and of the one for low noise.

        Raises:
            ValueError: the model has one expert, `source` is no pair, or as of `with_lora`.
        """
        if len(self.experts) != 2:
            raise ValueError(f"A pair of LoRAs is for a model of two experts; {self.name} has {len(self.experts)}.")
        high, low = resolve_pair(source)
        model, first = self.with_lora(high, strength=strengths[0], blocks=blocks, mode=mode, expert=0)
        model, second = model.with_lora(low, strength=strengths[1], blocks=blocks, mode=mode, expert=1)
        return model, (first, second)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the weights count as at work where they are, as a trainer has them; runs use them there."""
        with ExitStack() as stack:
            for expert in self.experts:
                stack.enter_context(WeightProvider.of(expert.dit).held())
            yield

    def without_loras(self) -> "VideoModel":
        """A handle on the same weights without LoRAs."""
        return replace(self, experts=tuple(replace(expert, loras=()) for expert in self.experts))

    def target(self, expert: int = 0) -> Target:
        """The names and shapes that a LoRA of that expert is matched with."""
        return Target.of_modules(self.name, (self.experts[expert].dit, *self._beside))

    def plan(
        self,
        inputs: RunInputs,
        settings: SamplerSettings,
        memory: MemorySettings,
        runtime: Runtime,
        expert: int = 0,
    ) -> RunPlan:
        """Where the weights of an expert will be while it works, see `planning.run`.

        Args:
            runtime: with `memory.vram_limit` applied (`limit_memory`).
        """
        dit, loras, cond = self.experts[expert].dit, self.experts[expert].loras, inputs.cond
        plan = plan_on(runtime, dit, cond, inputs.size, settings, memory, self.motion_controller, loras)
        log.log(logging.WARNING if plan.missing else logging.INFO, "%s: %s.", self.name, plan.summary())
        return plan

    @contextmanager
    def working(
        self,
        steps: int,
        device: torch.device,
        placement: Placement | None = None,
        *,
        expert: int = 0,
        keep: bool = False,
    ) -> Iterator[LoraRun]:
        """An expert on `device`, with its LoRAs applied for a run of `steps`, inside the block.

        Args:
            placement: of its weights, as a plan has it; all of them on the device if None.
            keep: leave them there for the next run.
        """
        # Reading puts new layers in the place of those on the meta device, so it comes before a LoRA's hooks.
        dit, loras = self.experts[expert].dit, self.experts[expert].loras
        WeightProvider.of(dit).read()
        streamed = placement is not None and bool(placement.streamed)
        # LoRAs first: folded weights have to move to the device with the others.
        with ExitStack() as stack:
            run = stack.enter_context(
                apply_loras((dit, *self._beside), loras, MODEL_BLOCKS, steps=steps, device=device, streamed=streamed)
            )
            if self.motion_controller is not None:
                stack.enter_context(WeightProvider.of(self.motion_controller).working(device))
            stack.enter_context(WeightProvider.of(dit).working(device, placement, keep=keep))
            yield run

    def sample(
        self,
        inputs: RunInputs,
        settings: SamplerSettings,
        memory: MemorySettings,
        runtime: Runtime,
        *,
        checkpoint: Checkpoint | None = None,
        earlier: RunState | None = None,
        keep: bool = False,
    ) -> RunState:
        """Run the steps of `settings`: plan, apply the LoRAs, bring the weights, sample, release.

        An expert is planned and brought when its first step comes, after the one before it has left the device. Weights
        that are at work already, such as a trainer's, are used where they are.

        Args:
            checkpoint, earlier: as of `sampling.run.sample`, which says what comes back and what is raised.
            keep: leave weights on the device for the next run.
        """
        if self.cards is not None:
            task = FollowFilm.of(self.source, self.name, self.experts, runtime.dtype, keep)
            return self.cards.sample(FilmRequest(task, inputs, settings, memory, earlier), runtime, checkpoint)
        runtime, settings = limit_memory(sharing(runtime), memory), continuing(settings, inputs.cond)

        def place(number: int, settings: SamplerSettings) -> RunPlan:
            return self.plan(inputs, settings, memory, runtime, number)

        def announce(number: int) -> None:
            expert = self.experts[number]
            if WeightProvider.of(expert.dit).mapped or next(expert.dit.parameters()).is_meta:
                ahead.start(expert.files)

        cache = self.resolved(settings.cache)
        settings, inputs = replace(settings, cache=cache), inputs.to(runtime.device)
        with kernels.run(deterministic=self.deterministic), ReadAhead() as ahead:
            followed = runtime.ranks and FollowFilm.of(self.source, self.name, self.experts, runtime.dtype, keep)
            activate = self._activation(runtime, keep, place)
            model = RunModel(self.experts, self.motion_controller, activate, announce, followed)
            state = sample(model, inputs, settings, runtime, checkpoint=checkpoint, earlier=earlier)
        if isinstance(cache, MagCacheSettings) and cache.measures:
            magnitudes.save(self.experts[0].files, self.name, state.memory["magnitudes.ratios"][1:].tolist(), settings)
        return state

    def follow(self, runtime: Runtime, *, keep: bool = False) -> None:
        """Take part in a run of this model that rank 0 leads, until it ends."""
        model = RunModel(self.experts, self.motion_controller, self._activation(runtime, keep))
        follow(model, runtime, deterministic=self.deterministic)

    def _activation(
        self, runtime: Runtime, keep: bool, place: Callable[[int, SamplerSettings], RunPlan] | None = None
    ) -> Activate:
        """How an expert's weights are brought; `place` plans where to, for what another rank has not placed."""

        @contextmanager
        def activate(number: int, settings: SamplerSettings, placement: Placement | None) -> Iterator[Active]:
            dit = self.experts[number].dit
            if WeightProvider.of(dit).at_work:
                yield Active(dit, settings)
                return
            # Two experts rarely fit together; what the other one left on the device would force this one to stream.
            for other in self.experts:
                if other.dit is not dit:
                    WeightProvider.of(other.dit).evict()
            self._make_room(number)
            if placement is None and place is not None:
                plan = place(number, settings)
                placement, settings = plan.placement, plan.settings
            with self.working(settings.total_steps, runtime.device, placement, expert=number, keep=keep) as run:
                yield Active(dit, settings, run.before_step, placement)

        return activate

    def resolved(self, cache: CacheSettings | None) -> CacheSettings | None:
        """`cache` with this model's numbers where it says `auto`.

        Raises:
            ValueError: none are known of this model, it has too few blocks, or what is measured cannot be kept.
        """
        return resolved_cache(cache, self.row, self.experts[0].files, self.name, self.config.num_layers)

    def _make_room(self, number: int) -> None:
        """Drop the weights of other experts where host memory has no room to read those of this one beside them."""
        dit = self.experts[number].dit
        if not next(dit.parameters()).is_meta or weight_bytes(dit) < available_ram():
            return
        for other in self.experts:
            WeightProvider.of(other.dit).drop()

    def fit(self, cond: Conditioning, size: VideoSize | None = None) -> Conditioning:
        """`cond` as this model takes it, for a video of `size`.

        Raises:
            ValueError: an input is missing, is not one that the model takes, or was made for another size.
        """
        return fit(cond, self.variant, self.config, self.name, size, self.motion_controller is not None)
