"""PyTorch checkpoints: read as PyTorch reads them, and never run."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from math import prod
from types import MappingProxyType

import pytest
import torch
from torch import nn

from wan_core.loading.pickles import MAX_OPERATIONS, require_plain
from wan_core.loading.tensor_files import CheckpointError, TensorFiles, read_header

BASE = torch.arange(24.0)
CONTENT = OrderedDict(
    matrix=BASE.reshape(4, 6),
    transposed=BASE.reshape(4, 6).T,
    part=BASE.reshape(4, 6)[1:3, 2:5],
    scalar=torch.tensor(3.5, dtype=torch.bfloat16),
    empty=torch.zeros(0, 7),
    unit=torch.ones(1, 3, 1).transpose(0, 2),
    fp8=torch.ones(2, 3).to(torch.float8_e4m3fn),
    whole=torch.arange(5),
    flags=torch.tensor([True, False]),
    parameter=nn.Parameter(torch.ones(2, 2)),
    shared=BASE,
)
CONTENT._metadata = {"version": 1}  # `nn.Module.state_dict` adds such an attribute


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_as_pytorch_reads(tmp_path, zipped, protocol):
    file = tmp_path / "m.pth"
    torch.save(CONTENT, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    header = read_header([file])
    with TensorFiles(header) as files:
        for name, tensor in CONTENT.items():
            assert header[name].shape == tuple(tensor.shape) and header[name].dtype == tensor.dtype
            read, borrowed = files.read(name), files.borrow(name)
            assert read.is_contiguous() and read.dtype == tensor.dtype
            assert torch.equal(read.float(), tensor.float()) and torch.equal(borrowed.float(), tensor.float())
            view = files.map(name)
            assert view is None or torch.equal(view.float(), tensor.float())
        assert not zipped or files.map("matrix") is not None


def archive(pickled: bytes, records=MappingProxyType({"0": bytes(16)}), compression=zipfile.ZIP_STORED) -> bytes:
    """A PyTorch checkpoint with that pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as written:
        written.writestr("m/data.pkl", pickled)
        for key, data in records.items():
            written.writestr(f"m/data/{key}", data)
    return stream.getvalue()


def global_(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tensor(shape, strides, start=0, count=4, kind="torch FloatStorage", key="0") -> bytes:
    """The instructions of a tensor."""
    storage = b"(" + text("storage") + global_(kind) + text(key) + text("cpu") + number(count) + b"tQ"
    place = number(start) + pickle.dumps(shape, 2)[2:-1] + pickle.dumps(strides, 2)[2:-1]
    return global_("torch._utils _rebuild_tensor_v2") + b"(" + storage + place + b"\x89}tR"


def state(*values: bytes) -> bytes:
    items = b"".join(text(f"t{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def call(name: str, *arguments: bytes) -> bytes:
    return global_(name) + b"(" + b"".join(arguments) + b"tR"


NESTED = b")" + b"q\0" + b"h\0h\0\x86q\0" * 60
"""A tuple of tuples of which each holds the one before twice: to hash it takes 2 to the power of 60 steps."""

GOOD = tensor((2, 2), (2, 1))
HOSTILE = {
    "stride 0": (archive(state(tensor((2**31, 2), (0, 0)))), "holds 4 numbers"),
    "overlapping rows": (archive(state(tensor((4, 4), (0, 1)))), "holds 4 numbers"),
    "negative stride": (archive(state(tensor((2, 2), (-1, 1), start=3))), "describes a tensor"),
    "start beyond": (archive(state(tensor((2, 2), (2, 1), start=1))), "holds 4 numbers"),
    "shape beyond": (archive(state(tensor((3, 2), (2, 1)))), "holds 4 numbers"),
    "shape of texts": (archive(state(tensor(("a", 2), (2, 1)))), "describes a tensor"),
    "shape without strides": (archive(state(tensor((2, 2), ()))), "in a way that PyTorch does not"),
    "sixty axes": (archive(state(tensor((1,) * 60, (1,) * 60))), "in a way that PyTorch does not"),
    "empty and endless": (archive(state(tensor((0, 2**60), (1, 1)))), "which no file can hold"),
    "count beyond the record": (archive(state(tensor((2, 2), (2, 1), count=5))), "should have 5 numbers"),
    "no such record": (archive(state(tensor((2, 2), (2, 1), key="7"))), "'7' is missing"),
    "many names of one storage": (
        archive(state(*[tensor((1024,), (1,), count=1024)] * 60), {"0": bytes(4096)}), "times its own size",
    ),
    "compressed": (archive(state(GOOD), {"0": bytes(2**20)}, zipfile.ZIP_DEFLATED), "compressed"),
    "bytearray": (archive(state(GOOD, call("builtins bytearray", number(2**33)))), "would run builtins.bytearray"),
    "system": (archive(state(GOOD, call("posix system", text("true")))), "would run posix.system"),
    "dotted name": (archive(state(GOOD, call("torch.os system", text("true")))), "would run torch.os.system"),
    "no storage's name": (archive(state(tensor((2, 2), (2, 1), kind="os FloatStorage"))), "would run os.FloatStorage"),
    "unknown storage": (archive(state(tensor((2, 2), (2, 1), kind="torch EvilStorage"))), "none of PyTorch's"),
    "call of a number": (archive(state(GOOD, number(1) + b")R")), "cannot be called"),
    "call of a dtype": (archive(state(GOOD, call("torch float32"))), "cannot be called"),
    "items of a list": (archive(b"\x80\x02](" + text("a") + GOOD + b"u."), "sets items"),
    "append to a dict": (archive(b"\x80\x02}" + GOOD + b"a."), "no list"),
    "key that is slow to hash": (archive(b"\x80\x02}(" + NESTED + GOOD + b"u."), "sets items"),
    "slow pairs": (archive(state(GOOD, call("collections OrderedDict", NESTED))), "damaged"),
    "memo bomb": (archive(b"\x80\x02}r\xff\xff\xff\xff" + state(GOOD)[2:]), None),
    "no such memo": (archive(b"\x80\x02h\x09."), "9 is missing"),
    "deep": (archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "no named tensors"),
    "too many instructions": (archive(b"\x80\x02" + b"]" * (MAX_OPERATIONS + 2) + b"."), "is none that torch.save"),
    "long text that is not there": (archive(b"\x80\x02X\xff\xff\xff\xffabc."), "damaged"),
    "itself inside": (archive(b"\x80\x02}q\0" + text("model") + b"h\0s."), "no named tensors"),
    "empty stack": (archive(b"\x80\x02t."), "damaged"),
    "long name": (archive(b"\x80\x02}" + text("n" * 10_000) + GOOD + b"s."), "has 10000 characters"),
    "no content": (archive(b""), "damaged"),
    "text protocol": (archive(b"\x80\x02L" + b"9" * 100_000 + b"L\n."), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "m.pth").write_bytes(content)
    if message is None:
        assert read_header([tmp_path / "m.pth"])["t0"].shape == (2, 2)
        return
    with pytest.raises(CheckpointError, match=message) as error:
        read_header([tmp_path / "m.pth"])
    assert "m.pth" in str(error.value)
    if "no named tensors" not in message and name != "long name":
        with pytest.raises(CheckpointError, match=r"m\.pth"):
            require_plain(tmp_path / "m.pth")


def test_hostile_directories(tmp_path):
    """The end of an archive may promise a directory of any length at any place, on any of several disks."""
    whole = bytearray(archive(state(GOOD)))
    end = whole.rindex(b"PK\5\6")
    disks = b"PK\6\7" + struct.pack("<IQI", 0, 0, 2)
    for at, value in ((12, 2**32 - 1), (16, 2**32 - 1), (12, 0), (16, 1), (None, 0)):
        changed = whole.copy() if at is not None else whole[:end] + disks + whole[end:]
        at = at or 12
        struct.pack_into("<I", changed, end + at, value)
        (tmp_path / "m.pth").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"m\.pth"):
            read_header([tmp_path / "m.pth"])


def test_states_of_optimizers_are_plain(tmp_path):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    require_plain(tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert loaded["state"][0]["exp_avg"].equal(optimizer.state[layer.weight]["exp_avg"])


def test_memory_is_counted_over_all_names(tmp_path):
    """What is stored twice in name loads; that is how embeddings and their copies are saved."""
    tied = torch.ones(100, 100)
    torch.save({"shared": tied, "copy": tied}, tmp_path / "m.pth")
    header = read_header([tmp_path / "m.pth"])
    assert sum(prod(info.shape) for info in header.values()) == 20_000
