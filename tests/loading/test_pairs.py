"""Two files are found as the experts of one model, by their names; mistakes are told before anything is read."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.loading.inventories import tiny
from wan_core import bundled, catalog
from wan_core.catalog import tiny_id
from wan_core.inspection import report
from wan_core.loading.detect import detect_files
from wan_core.loading.pairs import check_pair, expand, find_pairs, resolve_experts, resolve_pair, side_of
from wan_core.loading.tensor_files import CheckpointError
from wan_core.model_files import experts_of, inspect_experts

PAIR = tiny_id("t2v", is_pair=True)
NAMES = {
    "wan2.2_t2v_{high,low}_noise_14B_fp16.safetensors": (
        "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors",
    ),
    "{High,Low}Noise/Wan2.2-T2V-A14B-{High,Low}Noise-Q4_K_M.gguf": (
        "HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "LowNoise/Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf",
    ),
    "a/{high,low}_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors": (
        "a/high_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors",
        "a/low_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors",
    ),
    "r/{transformer,transformer_2}/d.safetensors": ("r/transformer/d.safetensors", "r/transformer_2/d.safetensors"),
    "Wan2_2-I2V-A14B-{HIGH,LOW}_fp8_e4m3fn_scaled.safetensors": (
        "Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled.safetensors", "Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled.safetensors",
    ),
    "mix_I2V{High,Low}_v1.safetensors": ("mix_I2VHigh_v1.safetensors", "mix_I2VLow_v1.safetensors"),
    "{high,low}-noise.safetensors": ("high-noise.safetensors", "low-noise.safetensors"),
}  # fmt: skip
ALONE = (
    "wan2.1_t2v_low_vram.safetensors", "lora_low_rank.safetensors", "slow.safetensors", "Highlights.safetensors",
    "overflow.safetensors", "s/transformer/d.safetensors", "high_and_low.safetensors",
    "a/high_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors",
    "a/low_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors", "only_high_noise.safetensors",
)  # fmt: skip


def test_names_of_a_list_are_paired():
    everything = [name for pair in NAMES.values() for name in pair[::-1]]
    assert find_pairs([*ALONE, *everything]) == NAMES
    for shown, pair in NAMES.items():
        assert expand(shown) == pair
    assert expand("plain.safetensors") == ("plain.safetensors",)


@pytest.mark.parametrize("shown", [shown for shown in NAMES if not shown.startswith("r/")])
def test_a_name_says_which_expert_it_is(shown):
    assert [side_of(name) for name in NAMES[shown]] == ["high", "low"]
    assert [side_of(Path("/models/low_noise", name)) for name in NAMES[shown]] == ["high", "low"]


@pytest.mark.parametrize("name", [name for name in ALONE if "noise" not in name])
def test_other_words_say_nothing(name):
    assert side_of(name) is None


def test_a_folder_says_which_expert_a_file_is():
    assert side_of("LowNoise/model.safetensors") == side_of("r/transformer_2/model.safetensors") == "low"
    assert side_of("high_noise_lora/step/epoch/5.safetensors") == "high"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The bundled pair, in the authors' layout."""
    return bundled.write_model(tmp_path_factory.mktemp("models"), PAIR)


def names(files) -> list[str]:
    return [group[0].parent.name if group[0].name == catalog.DIT_FILE else group[0].name for group in files]


def link(place: Path, repository: Path, **files: str) -> Path:
    """Files of the pair under other names in `place`."""
    for expert, name in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).hardlink_to(repository / f"{expert}_noise_model" / catalog.DIT_FILE)
    return place


def test_a_pair_is_found_in_the_repository_of_its_authors(repository):
    assert names(resolve_experts(repository)) == ["high_noise_model", "low_noise_model"]
    assert names(resolve_experts(repository / "low_noise_model")) == ["low_noise_model"]


def test_a_pair_is_found_by_its_names(repository, tmp_path):
    folder = link(tmp_path, repository, high="a_HIGH.safetensors", low="a_LOW.safetensors")
    both = ["a_HIGH.safetensors", "a_LOW.safetensors"]
    for path in (
        folder,
        folder / "a_{HIGH,LOW}.safetensors",
        [folder / name for name in both],
        [folder / name for name in both[::-1]],
    ):
        assert names(resolve_experts(path)) == both
    assert names(resolve_experts(folder / both[1])) == both[1:]
    for name in both:
        assert [file.name for file in resolve_pair(folder / name)] == both


def test_the_order_of_a_list_counts_where_names_say_nothing(repository, tmp_path):
    folder = link(tmp_path, repository, high="b.safetensors", low="a.safetensors")
    assert names(resolve_experts([folder / "b.safetensors", folder / "a.safetensors"])) == [
        "b.safetensors", "a.safetensors",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="holds 2 models"):
        resolve_experts(folder)
    with pytest.raises(CheckpointError, match="none beside it is named as its counterpart"):
        resolve_pair(folder / "a.safetensors")


def test_a_folder_of_two_pairs_lists_them(repository, tmp_path):
    folder = link(tmp_path, repository, high="a_high.safetensors", low="a_low.safetensors")
    link(folder, repository, high="b_high.safetensors", low="b_low.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 pairs of experts(.|\n)*a_\{high,low\}(.|\n)*b_\{high,low\}"):
        resolve_experts(folder)


@pytest.mark.parametrize(("ratio", "boundary"), [(0.9, 0.9), (None, 0.875), ("much", 0.875)])
def test_the_boundary_is_that_of_the_repository(repository, tmp_path, ratio, boundary):
    folder = link(tmp_path, repository, high="transformer/d.safetensors", low="transformer_2/d.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": ratio} if ratio else {}))
    high, low = experts_of(inspect_experts(folder))
    assert (high.lowest, low.lowest) == (boundary * 1000, 0)
    assert experts_of(inspect_experts(folder), 0.5)[0].lowest == 500


@pytest.mark.parametrize(
    ("variant", "boundary"), [("t2v", 875), ("vace", 875), ("i2v_a14b", 900), ("fun_a14b_control", 900)]
)
def test_the_boundary_is_that_of_the_authors(variant, boundary, tmp_path):
    folder = bundled.write_model(tmp_path, tiny_id(variant, is_pair=True))
    assert [expert.lowest for expert in experts_of(inspect_experts(folder))] == [boundary, 0]


def test_a_report_says_which_expert_a_file_is(repository, tmp_path):
    assert ("expert", "for low noise, by its name") in report(repository / "low_noise_model").lines
    both = [value for title, value in report(repository).lines if title == "expert"]
    assert both == [f"for {side} noise, by its name" for side in ("high", "low")]
    folder = link(tmp_path, repository, high="wan2.2_t2v.safetensors")
    assert "expert" not in dict(report(folder / "wan2.2_t2v.safetensors").lines)


def test_a_name_of_a_file_with_braces_is_itself(tmp_path):
    path = tmp_path / "{a,b}.safetensors"
    path.touch()
    assert expand(str(path)) == (str(path),) and names(resolve_experts(path)) == [path.name]


def test_mistakes_with_a_pair_are_told(repository, tmp_path):
    high, low = inspect_experts(repository)
    with pytest.raises(CheckpointError, match=r"high_noise_model/.* was given for both experts"):
        check_pair(high, high)
    with pytest.raises(CheckpointError, match=r"low_noise_model/.* for high noise and .*their names say otherwise"):
        check_pair(low, high)
    with pytest.raises(ValueError, match="one transformer or two; got 3"):
        experts_of([high, low, low])
    save_file(tiny("dit_i2v_a14b"), tmp_path / "i2v_low.safetensors")
    other = detect_files(tmp_path / "i2v_low.safetensors")
    with pytest.raises(CheckpointError, match=r"differ in structure \(in_channels\)"):
        check_pair(high, other)
    assert [expert.lowest for expert in experts_of([low])] == [0]
