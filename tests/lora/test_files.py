"""Mistakes are said in words; merged, cut and extracted files do what was asked; nothing is overwritten."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import fork_server
from tests.lora.fixtures import RANK, WRITERS, factors, linear_paths
from tests.lora.test_dialects import merged_output, output, used, with_loras
from tests.programs import PATIENCE
from tests.reference import relative_error, tiny_dit
from wan_core.atomic import numbered_paths, partial_path
from wan_core.loading.foreign_names import diffusers_name
from wan_core.loading.names import KEY_LAYOUTS, rename
from wan_core.lora.convert import LoraFormat, convert, extract_lora
from wan_core.lora.target import Target, lora_file_report, open_lora, use_lora
from wancore.headless.cli import main

ROOT = Path(__file__).resolve().parents[2]
EXACT = LoraFormat(dtype="fp32")


def lora_file(folder: Path, tensors: dict[str, torch.Tensor], name: str = "lora") -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def sized(width: int, blocks: int, *extra: str) -> dict[str, torch.Tensor]:
    """A LoRA for a model of this width: rank 1 on the queries of every block."""
    paths = [f"blocks.{i}.self_attn.q" for i in range(blocks)] + list(extra)
    tensors = {f"diffusion_model.{path}.lora_A.weight": torch.ones(1, width) for path in paths}
    return tensors | {f"diffusion_model.{path}.lora_B.weight": torch.ones(width, 1) for path in paths}


def target(width: int, blocks: int) -> Target:
    """A published text-to-video model by its shapes alone."""
    shapes = {f"blocks.{i}.self_attn.q.weight": (width, width) for i in range(blocks)}
    return Target("model.safetensors", shapes)


def test_a_small_lora_on_a_large_model(tmp_path):
    path = lora_file(tmp_path, sized(1536, 30))
    with pytest.raises(ValueError) as error:
        use_lora(path, target(5120, 40))
    assert "was made for Wan 2.1 1.3B: width 1536, 30 blocks" in str(error.value)
    assert "model.safetensors (Wan 2.1 14B: width 5120, 40 blocks) is another size" in str(error.value)
    with pytest.raises(ValueError, match=r"made for Wan 2.1 14B.*Wan 2.1 1.3B"):
        use_lora(lora_file(tmp_path, sized(5120, 40), "large"), target(1536, 30))


@pytest.mark.parametrize("variant", ["t2v", "i2v_a14b"])
def test_an_image_lora_on_a_model_without_image_tokens(tmp_path, variant):
    from wan_core.lora.target import lora_report

    path = lora_file(tmp_path, sized(256, 4, *(f"blocks.{i}.cross_attn.k_img" for i in range(4))))
    target = Target.of_modules("tiny", [tiny_dit(variant)])
    told = lora_report(use_lora(path, target), target)
    assert told.notes == (
        "It is for a model that reads pictures through CLIP: 4 names of that branch are left out, the others apply.",
    )
    assert "blocks.0-3.cross_attn.k_img" in str(told) and "with image input" in told.made_for


def test_more_blocks_than_the_model_has(tmp_path):
    use = use_lora(lora_file(tmp_path, sized(256, 6)), Target.of_modules("tiny", [tiny_dit("t2v")]))
    assert {s.name: s.reason for s in use.bound.skipped} == {
        f"blocks.{i}.self_attn.q": "the model has only 4 blocks" for i in (4, 5)
    }


def test_another_shape_in_one_place_is_skipped_by_name(tmp_path):
    tensors = sized(256, 2) | {"diffusion_model.patch_embedding.diff": torch.zeros(256, 36, 1, 2, 2)}
    use = use_lora(lora_file(tmp_path, tensors), Target.of_modules("tiny", [tiny_dit("t2v")]))
    assert [(s.name, s.reason) for s in use.bound.skipped] == [
        (
            "patch_embedding.weight",
            "made for shape [256, 36, 1, 2, 2], the model has [256, 16, 1, 2, 2]",
        )
    ]


def made_up(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(8, 1)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (made_up("transformer.double_blocks.0.img_attn.qkv"), "Nothing in .* matches tiny .*FLUX or HunyuanVideo"),
        (made_up("lora_unet_down_blocks_0_attentions_0_proj_in"), "a LoRA for Stable Diffusion"),
        (made_up("transformer.transformer_blocks.0.attn1.to_q"), "LTX-Video, CogVideoX"),
        (made_up("lora_te_text_model_encoder_layers_0_mlp_fc1"), "belongs to the text encoder"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 256)}, "counterpart is missing"),
        (
            {
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 256),
                "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.ones(256, 3),
            },
            "damaged at blocks.0.self_attn.q: lora_A .* different ranks",
        ),
        ({"visual.transformer.0.attn.to_qkv.weight": torch.ones(2, 2)}, "is no Wan model"),
    ],
)
def test_files_that_do_nothing_are_errors(tmp_path, tensors, words):
    path = lora_file(tmp_path, tensors)
    with pytest.raises(ValueError, match=words):
        used(path, tiny_dit("t2v"))


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    for name, words in (("none", "does not exist"), ("empty", "is empty"), ("page", "a web page")):
        with pytest.raises(ValueError, match=words):
            open_lora(tmp_path / f"{name}.safetensors")


def test_peft_without_its_configuration_says_so(tmp_path):
    from wan_core.lora.target import lora_report

    made = factors(tiny_dit("t2v"), ["blocks.0.ffn.0"])
    path = lora_file(tmp_path, WRITERS["PEFT"](made))
    tiny = Target.of_modules("tiny", [tiny_dit("t2v")])
    assert "adapter_config.json, which is not beside the file" in str(lora_report(use_lora(path, tiny), tiny))


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, -2.0)])
def test_merging_is_exact(tmp_path, strengths):
    dit = tiny_dit("t2v")
    both = []
    for seed, paths in ((0, linear_paths(dit)), (1, linear_paths(dit, ".q", ".v"))):
        tensors = WRITERS["kohya" if seed else "diffusers"](factors(dit, paths, rank=RANK - seed, seed=seed))
        if seed:
            tensors |= {
                "lora_unet_blocks_0_ffn_0.diff_b": torch.ones(512),
                "lora_unet_blocks_0.diff_m": torch.ones(6, 256),
            }
        both.append((lora_file(tmp_path, tensors, str(seed)), strengths[seed]))
    saved = convert(both, tmp_path / "merged.safetensors", EXACT)
    assert saved.ranks == (RANK, 2 * RANK - 1) and saved.error == 0
    expected = with_loras(dit, *(used(path, dit, strength=s) for path, s in both))
    assert relative_error(with_loras(dit, used(saved.path, dit)), expected) < 1e-6


def test_cutting_to_a_rank(tmp_path):
    """Two LoRAs in the same four directions fit into rank four without loss; rank two loses what its report says."""
    dit = tiny_dit("t2v")
    made = factors(dit, linear_paths(dit))
    path = lora_file(tmp_path, WRITERS["ComfyUI"](made))
    twice = [(path, 1.0), (path, 0.5)]
    whole = convert(twice, tmp_path / "whole.safetensors", EXACT, rank=RANK)
    assert whole.ranks == (RANK,) and whole.error < 1e-5
    expected = with_loras(dit, used(path, dit, strength=1.5))
    assert relative_error(with_loras(dit, used(whole.path, dit)), expected) < 1e-5
    cut = convert(twice, tmp_path / "cut.safetensors", EXACT, rank=2)
    assert cut.ranks == (2,)
    lost = kept = 0.0
    stored = load_file(cut.path)
    for name, (down, up) in made.items():
        change = 1.5 * up @ down
        near = stored[f"diffusion_model.{name}.lora_B.weight"] @ stored[f"diffusion_model.{name}.lora_A.weight"]
        best = torch.linalg.svdvals(change)[2:].square().sum()
        assert (change - near).square().sum() == pytest.approx(best.item(), rel=1e-3)
        lost, kept = lost + best.item(), kept + change.square().sum().item()
    assert cut.error == pytest.approx((lost / kept) ** 0.5, rel=1e-3)


def hadamard(path: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    rows, columns = shape
    key = f"lycoris_{path.replace('.', '_')}"
    generator = torch.Generator().manual_seed(0)
    sizes = {"w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (rows, 2), "w2_b": (2, columns)}
    return {f"{key}.hada_{n}": torch.randn(s, generator=generator) * 0.3 for n, s in sizes.items()}


def test_loha_becomes_a_lora_of_its_rank(tmp_path):
    dit, path = tiny_dit("t2v"), "blocks.0.ffn.0"
    source = lora_file(tmp_path, hadamard(path, tuple(dit.get_submodule(path).weight.shape)))
    with pytest.raises(
        ValueError, match=r"plain LoRA factors only, but blocks\.0\.ffn\.0\.weight is changed by a LoHa"
    ):
        convert([(source, 1.0)], tmp_path / "out.safetensors", LoraFormat("diffsynth"))
    assert not (tmp_path / "out.safetensors").exists()
    saved = convert([(source, 1.0)], tmp_path / "out.safetensors", LoraFormat("diffsynth", "fp32"), rank=4)
    assert saved.error < 1e-4
    expected = with_loras(dit, used(source, dit))
    assert relative_error(with_loras(dit, used(saved.path, dit)), expected) < 1e-5
    other = lora_file(tmp_path, WRITERS["kohya"](factors(dit, [path])), "other")
    with pytest.raises(ValueError, match="LoHa and LoRA, whose sum is no LoRA; give a rank"):
        convert([(source, 1.0), (other, 1.0)], tmp_path / "both.safetensors", EXACT)


def test_dora_is_not_merged(tmp_path):
    dit, path = tiny_dit("t2v"), "blocks.0.ffn.0"
    tensors = WRITERS["kohya"](factors(dit, [path])) | {"lora_unet_blocks_0_ffn_0.dora_scale": torch.ones(512, 1)}
    with pytest.raises(ValueError, match="changed by a DoRA"):
        convert([(lora_file(tmp_path, tensors), 0.5)], tmp_path / "out.safetensors", EXACT)


def test_nothing_is_overwritten(tmp_path):
    source = lora_file(tmp_path, sized(256, 2))
    existing = tmp_path / "mine.safetensors"
    existing.write_text("precious")
    for call in (
        lambda: convert([(source, 1.0)], existing, EXACT),
        lambda: convert([(source, 1.0)], source, EXACT),
        lambda: extract_lora(source, source, existing, EXACT, rank=4),
    ):
        with pytest.raises(ValueError, match="exists already; nothing is overwritten"):
            call()
    assert existing.read_text() == "precious"
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        convert([(source, 1.0)], tmp_path / "lora.pt", EXACT)
    with pytest.raises(ValueError, match="different sizes"):
        convert([(source, 1.0), (lora_file(tmp_path, sized(1536, 2), "big"), 1.0)], tmp_path / "x.safetensors", EXACT)
    with pytest.raises(ValueError, match="LoRA format must be one of"):
        convert([(source, 1.0)], tmp_path / "x.safetensors", LoraFormat("webui"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "big.safetensors", "lora.safetensors", "mine.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("names", ["comfyui", "peft"])
def test_the_first_free_name_is_taken(tmp_path, names):
    source = lora_file(tmp_path, sized(1536, 2), "source")
    (tmp_path / "a_00001.safetensors").write_text("precious")
    saved = convert([(source, 1.0)], numbered_paths(tmp_path, "a", ".safetensors"), LoraFormat(names))
    assert saved.path == tmp_path / "a_00002.safetensors"
    assert str(lora_file_report(open_lora(saved.path)))


def test_what_a_kill_left_of_a_peft_folder_is_taken_over(tmp_path):
    source, out = lora_file(tmp_path, sized(1536, 2), "source"), tmp_path / "peft"
    out.mkdir()
    weights = out / "adapter_model.safetensors"
    partial_path(weights).write_bytes(b"half")
    (out / "adapter_config.json").write_text("{}")
    convert([(source, 1.0)], out, LoraFormat("peft"))
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", weights.name]
    assert str(lora_file_report(open_lora(out)))
    for left in (["notes.txt"], ["adapter_config.json"], [weights.name]):
        other = tmp_path / left[0]
        other.mkdir()
        for name in left:
            (other / name).write_text("precious")
        with pytest.raises(ValueError, match="exists already; nothing is overwritten"):
            convert([(source, 1.0)], other, LoraFormat("peft"))
        assert [(other / name).read_text() for name in left] == ["precious"]


def test_what_is_written_into_the_file(tmp_path):
    path = lora_file(tmp_path, sized(5120, 1))
    saved = convert([(path, 1.0)], tmp_path / "style.safetensors", LoraFormat())
    with safe_open(saved.path, "pt") as file:
        told = file.metadata()
    assert {told[k] for k in ("ss_network_dim", "ss_network_alpha")} == {"1"}
    assert told["ss_base_model_version"] == "wan2.1_t2v_14B" and told["modelspec.title"] == "style"
    assert json.loads(told["wancore"])["sources"] == [{"name": "lora.safetensors", "strength": 1.0}]
    assert {t.dtype for t in load_file(saved.path).values()} == {torch.bfloat16}


@torch.no_grad()
def test_extracting_what_a_lora_did(tmp_path):
    """A base with a LoRA and vectors folded in: the extraction at its rank gives them back."""
    base, tuned = tiny_dit("t2v"), tiny_dit("t2v")
    made = factors(base, linear_paths(base, ".q", ".o", "ffn.2", "head.head"))
    expected = merged_output(tuned, made)
    tuned.blocks[1].modulation.add_(0.1)
    tuned.blocks[2].self_attn.norm_q.weight.add_(0.1)
    tuned.patch_embedding.bias.add_(0.1)
    down, up = torch.randn(RANK, 64) * 0.1, torch.randn(256, RANK) * 0.1
    tuned.patch_embedding.weight.add_((up @ down).reshape(tuned.patch_embedding.weight.shape))
    files = [lora_file(tmp_path, dict(model.state_dict()), name) for model, name in ((base, "base"), (tuned, "tuned"))]
    expected = output(tuned)
    saved = extract_lora(*files, tmp_path / "lora.safetensors", EXACT, rank=RANK)
    assert saved.patches == len(made) + 4 and saved.error < 1e-3
    dit = tiny_dit("t2v")
    assert relative_error(with_loras(dit, used(saved.path, dit)), expected) < 1e-5
    cut = extract_lora(*files, tmp_path / "cut.safetensors", EXACT, rank=1)
    assert 0.3 < cut.error < 1
    with pytest.raises(ValueError, match="hold the same weights"):
        extract_lora(files[0], files[0], tmp_path / "none.safetensors", EXACT, rank=1)
    with pytest.raises(ValueError, match="rank must be a whole number from 1"):
        extract_lora(*files, tmp_path / "none.safetensors", EXACT, rank=0)


@torch.no_grad()
def test_large_matrices_are_decomposed_by_projection():
    from wan_core.lora.write import decompose

    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1200, 8, generator=generator) @ torch.randn(8, 1100, generator=generator)
    patch, lost = decompose(change, 8)
    assert relative_error(patch.delta(), change) < 1e-4 and lost / change.norm() < 1e-2


def test_every_original_name_has_its_diffusers_name_and_way_back():
    layout = next(d for d in KEY_LAYOUTS if (d.kind, d.name) == ("dit", "diffusers"))
    for variant in ("flf2v", "vace"):
        for name in tiny_dit(variant).state_dict():
            path, _, leaf = name.rpartition(".")
            spelled = f"{diffusers_name(path)}.{leaf}" if leaf in ("weight", "bias") else diffusers_name(name)
            assert rename(layout, spelled)[0] == name


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [fork_server.python(), "-m", "headless", "lora", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_the_command(tmp_path):
    base = lora_file(tmp_path, dict(tiny_dit("t2v").state_dict()), "base")
    path = lora_file(tmp_path, WRITERS["VideoX-Fun"](factors(tiny_dit("i2v"), linear_paths(tiny_dit("i2v")))))
    done = run(str(path), "--base", str(base))
    assert done.returncode == 0, done.stderr
    for words in (
        "dialect   VideoX-Fun (168 keys)", "rank      4", "alpha     alpha tensor over rank",
        "model     base.safetensors (a Wan model of its own size: width 256, 4 blocks)", "applied   46",
        "blocks.0-3.self_attn.q.weight", "image branch, which this model does not have",
        "note      It is for a model that reads pictures through CLIP: 10 names", "blocks.3",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    none = run(str(tmp_path / "none.safetensors"))
    assert (none.returncode, none.stdout) == (2, "") and "does not exist" in none.stderr


def test_the_command_in_process(tmp_path, capsys):
    base, tuned = tiny_dit("t2v"), tiny_dit("t2v")
    tuned.blocks[0].ffn[0].weight.data.add_(0.01)
    files = {
        name: str(lora_file(tmp_path, dict(m.state_dict()), name)) for name, m in (("base", base), ("tuned", tuned))
    }
    out = str(tmp_path / "out.safetensors")
    assert main(["lora", files["tuned"], "--extract", "--base", files["base"], "--out", out, "--rank", "2"]) == 0
    assert main(["lora", f"{out}=0.5", out, "--out", str(tmp_path / "merged.safetensors"), "--format", "kohya"]) == 0
    assert main(["lora", str(tmp_path / "merged.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "changes   1 parameters, rank 2" in printed and "rank      4" in printed and "dialect   kohya" in printed
    assert main(["lora", files["tuned"], "--base", files["base"]]) == 0
    assert "take the place of the model's" in capsys.readouterr().out
    for arguments, words in (
        (["lora", f"{out}=much"], "a strength is a number"),
        (["lora", out, "--out", out], "exists already"),
        (["lora", out, "--extract"], "--extract takes one fine-tuned checkpoint"),
        (["lora", out, "--rank", "3"], "--rank is for files that are written"),
        (["lora", out, "--base", out], "needs a Wan DiT"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
