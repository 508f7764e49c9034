"""FP8 files stay FP8 in memory, and other files become FP8 on the way; weights that stay in their file."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.reference import DITS, filled, relative_error, tiny_dit, tiny_image_encoder, tiny_text_encoder
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.model_files import DiTSettings, Offload, load_dit
from wan_core.models.dit import WanDiT
from wan_core.models.ops import Linear
from wan_core.offload import formats
from wan_core.offload.blocks import weight_bytes
from wan_core.offload.formats import FP8_MADE as FP8
from wan_core.offload.quant import QuantisedLinear, big_linears, quantise
from wan_core.offload.weights import WeightProvider
from wan_core.types import Conditioning

MODULES = {"dit": tiny_dit, "umt5": tiny_text_encoder, "clip": tiny_image_encoder}
DIALECTS = ("old", "new", "plain")


def stored(module: nn.Module, dialect: str, per_row: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a file with the big layers of `module` in FP8."""
    tensors = dict(module.state_dict())
    for path in big_linears(module):
        weight = tensors[f"{path}.weight"]
        if dialect == "plain":
            tensors[f"{path}.weight"] = weight.to(FP8)
            continue
        quantised, scale = formats.FP8.quantise(weight, per_row=per_row)
        tensors[f"{path}.weight"] = quantised
        scale = scale if per_row else scale.reshape(())
        if dialect == "old":
            tensors |= {f"{path}.scale_weight": scale, f"{path}.scale_input": torch.ones(())}
        else:
            mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
            tensors |= {f"{path}.weight_scale": scale, f"{path}.comfy_quant": mark}
    return tensors | ({"scaled_fp8": torch.zeros(0, dtype=FP8)} if dialect == "old" else {})


def write(tensors, folder, kind="safetensors"):
    file = folder / f"model.{kind}"
    save_file(tensors, file) if kind == "safetensors" else torch.save(tensors, file)
    return detect_files(file)


def velocity(dit, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(1, 5, 64, generator=draw)
    with torch.no_grad():
        return dit(latents.to(dtype), torch.tensor([500.0]), Conditioning(text=text))


@pytest.mark.parametrize(("name", "dialect"), list(product(MODULES, DIALECTS)))
def test_fp8_files_stay_fp8_and_stand_for_the_same_weights(tmp_path, name, dialect):
    component = write(stored(MODULES[name](), dialect, per_row=dialect == "new"), tmp_path)
    module = build(component, dtype=torch.bfloat16)
    plain = build(component, dtype=torch.float32, weights="plain")
    layers, wide = big_linears(module), big_linears(plain)
    assert layers and all(isinstance(layer, QuantisedLinear) and layer.weight.dtype == FP8 for layer in layers.values())
    assert all(torch.equal(layer.dequantised(), wide[path].weight) for path, layer in layers.items())
    assert all(layer.compute_dtype == torch.bfloat16 for layer in layers.values())
    rest = {id(p) for layer in layers.values() for p in layer.parameters()}
    assert not [n for n, p in module.named_parameters() if p.dtype in (FP8, torch.float32) and id(p) not in rest
                and not n.endswith("modulation")]  # fmt: skip
    assert sum(layer.weight.nbytes for layer in layers.values()) * 4 == sum(w.weight.nbytes for w in wide.values())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_dialects_and_plain_casts_compute_what_their_weights_do(tmp_path, dialect):
    component = write(stored(tiny_dit(), dialect), tmp_path)
    expected = velocity(build(component, dtype=torch.float32, weights="plain"))
    assert relative_error(velocity(build(component, dtype=torch.float32)), expected) < 1e-6
    assert relative_error(velocity(build(component, dtype=torch.bfloat16)), expected) < 0.02
    assert 0 < relative_error(expected, velocity(tiny_dit())) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_on_the_way_is_quantised_afterwards(tmp_path, dtype):
    component = write(tiny_dit("vace").state_dict(), tmp_path)
    there = build(component, dtype=dtype, weights="fp8")
    after = quantise(filled(WanDiT, DITS["vace"]))
    assert all(isinstance(layer, QuantisedLinear) for layer in big_linears(there).values())
    expected = after.state_dict()
    assert there.state_dict().keys() == expected.keys()
    for name, tensor in there.state_dict().items():
        exact = tensor.dtype in (FP8, torch.float32)
        assert torch.equal(tensor, expected[name] if exact else expected[name].to(dtype)), name


def test_fp8_leaves_what_is_fp8_already(tmp_path):
    component = write(stored(tiny_dit(), "old"), tmp_path)
    state = build(component, dtype=torch.bfloat16, weights="fp8").state_dict()
    assert all(torch.equal(state[k], t) for k, t in build(component, dtype=torch.bfloat16).state_dict().items())
    assert {t.shape for k, t in state.items() if k.endswith(".scale")} == {(1, 1)}


def test_fp8_weights_take_half_of_bfloat16(tmp_path):
    component = write(tiny_dit().state_dict(), tmp_path)
    half, whole = (
        sum(map(weight_bytes, big_linears(build(component, dtype=torch.bfloat16, weights=weights)).values()))
        for weights in ("fp8", "plain")
    )
    assert half / whole == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_bfloat16_layer_with_a_scale_is_not_fp8(tmp_path, scale):
    """Some packs give layers that are not quantised a scale all the same."""
    tensors = dict(tiny_dit().bfloat16().state_dict()) | {"blocks.0.ffn.0.scale_weight": torch.tensor(scale)}
    module = build(write(tensors, tmp_path), dtype=torch.bfloat16)
    assert type(module.blocks[0].ffn[0]) is Linear
    assert torch.equal(module.blocks[0].ffn[0].weight, scale * tensors["blocks.0.ffn.0.weight"])


@pytest.mark.parametrize("weights", ["fp16", None])
def test_an_unknown_way_of_holding_weights(tmp_path, weights):
    component = write(tiny_dit().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="weights must be one of"):
        build(component, dtype=None, weights=weights)
    with pytest.raises(ValueError, match="weights must be one of"):
        Offload(weights=weights)


@pytest.mark.parametrize("works", [True, False])
def test_fp8_products_are_refused_before_weights_are_read(tmp_path, monkeypatch, works):
    component = write(tiny_dit().state_dict(), tmp_path)
    monkeypatch.setattr("wan_core.offload.quant.supports_fp8_matmul", lambda device: works)
    dtype = torch.float32 if works else torch.bfloat16
    monkeypatch.setattr("wan_core.model_files.build", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="set dtype to bf16" if works else "Turn it off"):
        load_dit(component, DiTSettings(dtype=dtype, fp8_matmul=True), Offload(weights="fp8"))


CASES = {
    "bfloat16": (lambda: dict(tiny_dit().bfloat16().state_dict()), "auto"),
    "float32": (lambda: dict(tiny_dit().state_dict()), "auto"),
    "scaled": (lambda: stored(tiny_dit(), "old"), "auto"),
    "rows": (lambda: stored(tiny_dit(), "new", per_row=True), "fp8"),
    "cast": (lambda: stored(tiny_dit(), "plain"), "auto"),
    "cast, plain": (lambda: stored(tiny_dit(), "plain"), "plain"),
}


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("case", CASES)
def test_mapped_weights_compute_what_loaded_ones_do(tmp_path, case, kind):
    make, weights = CASES[case]
    component = write(make(), tmp_path, kind)
    loaded = build(component, dtype=torch.bfloat16, weights=weights)
    mapped = build(component, dtype=torch.bfloat16, weights=weights, mapped=True)
    work = WeightProvider.of(mapped).work_dtypes
    for name, parameter in mapped.named_parameters():
        inside = name.startswith("blocks.")
        source = component.sources[name]
        assert parameter.dtype == (source.dtype if inside else loaded.get_parameter(name).dtype)
        expected = loaded.get_parameter(name).dtype
        assert work.get(name, parameter.dtype) == expected and (name in work) == (parameter.dtype != expected)
    with WeightProvider.of(mapped).working(torch.device("cpu")):
        assert torch.equal(velocity(mapped, torch.bfloat16), velocity(loaded, torch.bfloat16))
    assert mapped.blocks[0].ffn[0].weight.dtype == component.sources["blocks.0.ffn.0.weight"].dtype


def test_a_misaligned_file_is_read_where_it_cannot_be_mapped(tmp_path):
    """Bytes after an odd number of FP8 weights: no view can begin there."""
    tensors = {k: t.contiguous() for k, t in tiny_dit().state_dict().items()}
    entries, data = {"odd.scale_input": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        span = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        data += raw
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    component = detect_files(tmp_path)
    for mapped in (True, False):
        state = build(component, dtype=torch.float32, mapped=mapped).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_mapped_model_does_not_write_into_its_file(tmp_path):
    component = write(tiny_dit().state_dict(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    module = build(component, dtype=torch.float32, mapped=True)
    module.blocks[0].ffn[0].weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("dialect", "arguments", "message"),
    [
        (None, {"weights": "fp8"}, r"does not hold its weights as FP8.*convert .*--fp8"),
        ("old", {"weights": "plain"}, "set weights to 'auto'"),
        ("old", {"device": "cuda"}, "are on the CPU, not on cuda"),
        ("legacy", {}, "old format.*convert"),
    ],
)
def test_what_cannot_stay_on_disk(tmp_path, dialect, arguments, message):
    if dialect == "legacy":
        torch.save(dict(tiny_dit().state_dict()), tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        component = detect_files(tmp_path)
    else:
        tensors = stored(tiny_dit(), dialect) if dialect else tiny_dit().state_dict()
        component = write(tensors, tmp_path)
    with pytest.raises(ValueError, match=message):
        build(component, dtype=torch.bfloat16, mapped=True, **arguments)
