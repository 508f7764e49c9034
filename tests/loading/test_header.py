"""Headers: what is in a file, and what is said about files that are not what they should be."""

import json
import pickle

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from tests.attack.mutations import safetensors_mutations
from wan_core.loading.tensor_files import CheckpointError, file_kind, read_header

TENSORS = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.randn(3).bfloat16(),
    "c": torch.zeros(()),
    "n": torch.ones(2).byte(),
}


class Runs:
    """Unpickles by calling something."""

    def __reduce__(self):
        # Not `print` itself: Ray puts its own in its place.
        return exec, ("print('ran')",)


def expect(header):
    assert {k: (i.shape, i.dtype) for k, i in header.items()} == {
        k: (tuple(t.shape), t.dtype) for k, t in TENSORS.items()
    }


def test_safetensors(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file, {"note": "yes"})
    header = read_header([file])
    expect(header)
    assert header.files == (file,) and header.metadata == {"note": "yes"} and header["c"].file == file


@pytest.mark.parametrize(
    "wrapper", [(), ("state_dict",), ("module",), ("model_state",), ("model",), ("state_dict", "model")]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, wrapper, zipped):
    content = TENSORS
    for key in wrapper:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    expect(read_header([tmp_path / "a.pth"]))


def test_content_decides_not_the_suffix(tmp_path):
    save_file(TENSORS, tmp_path / "a.pth")
    expect(read_header([tmp_path / "a.pth"]))
    torch.save(TENSORS, tmp_path / "a.ckpt")
    expect(read_header([tmp_path / "a.ckpt"]))
    torch.save(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="rename it to end in"):
        read_header([tmp_path / "a.safetensors"])


def test_fp8_and_shards(tmp_path):
    save_file({"x": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "1.safetensors")
    torch.save({"y": torch.zeros(3)}, tmp_path / "2.pth")
    header = read_header([tmp_path / "1.safetensors", tmp_path / "2.pth"])
    assert header["x"].dtype == torch.float8_e4m3fn and header["y"].file.name == "2.pth" and len(header) == 2


@pytest.mark.parametrize("length_byte", [0x7B, 0x3C, 0x20, 0x47])
def test_header_lengths_that_look_like_text(tmp_path, length_byte):
    raw = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    raw += b" " * ((length_byte - len(raw)) % 256)
    (tmp_path / "a").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    assert read_header([tmp_path / "a"])["a"].shape == (1,)


def pth_bytes(content, tmp_path):
    torch.save(content, tmp_path / "made.pth")
    return (tmp_path / "made.pth").read_bytes()


def damaged(entries, data=b""):
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + data


WHOLE = save(TENSORS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
BAD = {
    "empty": (b"", "is empty"),
    "lfs pointer": (POINTER, "git-LFS pointer"),
    "html": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "html after blank lines": (b"\n\n  <html>", "web page"),
    "json": (b'{"message": "not found"}', "JSON"),
    "garbage": (b"\x01\x02garbage", "neither a safetensors file, a GGUF file nor"),
    "short of data": (WHOLE[:-1], f"truncated: it has {len(WHOLE) - 1} bytes, its header says {len(WHOLE)}"),
    "short of header": (WHOLE[:40], "truncated or damaged"),
    "too long": (WHOLE + b"x", f"damaged: it has {len(WHOLE) + 1} bytes"),
    "header not json": ((16).to_bytes(8, "little") + b"{nothing of json", "damaged safetensors header"),
    "header without offsets": (damaged({"a": {"dtype": "F32", "shape": [1]}}), "damaged safetensors header"),
    "unknown dtype": (
        damaged({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "stores tensors as Q4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header([tmp_path / "bad.safetensors"])
    assert "bad.safetensors" in str(error.value)


def test_bad_pickles(tmp_path, capsys):
    whole = pth_bytes(TENSORS, tmp_path)
    cases = {
        "truncated": whole[: len(whole) // 2],
        "refused: .* would run __builtin__.exec": pickle.dumps({"a": Runs()}, 2),
        "is refused: it holds more": pth_bytes({"a": torch.ones(1), "b": Runs()}, tmp_path),
        "holds no named tensors": pth_bytes([torch.ones(1)], tmp_path),
        "holds no named tensors that are known: its top level holds 'epoch'": pth_bytes({"epoch": 3}, tmp_path),
        "is a damaged PyTorch": b"\x80\x02garbage",
        "is a damaged PyTorch checkpoint: pickle exhausted": b"\x80\x02",
    }
    for message, content in cases.items():
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_header([tmp_path / "bad.pth"])
    assert "ran" not in capsys.readouterr().out


def test_same_name_in_two_files(tmp_path):
    save_file({"x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"y": torch.ones(1), "z": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2.safetensors and 1.safetensors both hold 'y'"):
        read_header([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


def test_no_files():
    with pytest.raises(CheckpointError, match="No model file"):
        read_header([])


def test_kind_of_file(tmp_path):
    torch.save(TENSORS, tmp_path / "a")
    save_file(TENSORS, tmp_path / "b")
    (tmp_path / "c").write_bytes(b"GGUF")
    assert [file_kind(tmp_path / name) for name in "abc"] == ["pickle", "safetensors", "gguf"]


STRICTER = (
    "occurs twice", "is the most", "are the most", "no file can hold", "does not know", "starts with", "indices must",
)  # fmt: skip
"""Why files are refused that the library takes."""


@pytest.mark.parametrize("seed", range(2))
def test_safetensors_are_refused_where_the_library_refuses_them(tmp_path, seed):
    """And nowhere else, but for the bounds of a header, names that occur twice, and entries that are no objects."""
    file, loose, sound, refused = tmp_path / "m.safetensors", 0, 0, 0
    for name, content in safetensors_mutations(WHOLE, 250, seed):
        file.write_bytes(content)
        try:
            with safe_open(file, "pt") as stream:
                expected = {key: stream.get_slice(key).get_shape() for key in stream.keys()}  # noqa: SIM118
        except SafetensorError:
            expected = None
        try:
            found = {key: list(info.shape) for key, info in read_header([file]).items()}
        except CheckpointError as error:
            refused += expected is None
            assert expected is None or any(map(str(error).__contains__, STRICTER)), (name, error)
            loose += expected is not None
        else:
            assert found == expected, name
            sound += 1
    assert refused > 100 and sound > 10 and loose < 50
