"""Damaged and hostile files, made from whole ones: each follows from a number, so that it can be made again."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

Header = dict[str, Any]

WRONG_NUMBERS = (-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 1.5, "1", None, True, [1], {}, 10**400)
WRONG_DTYPES = ("F64", "F16", "I8", "F4", "Q4", "", None, 7, ["F32"], "f32")
WRONG_NAMES = ("", "a" * 5000, "\0", "\ud800", "blocks.3000000.ffn.0.weight", "../x", "__metadata__ ", "\u4e2d")
WRONG_VALUES = (None, [], {}, 3, "text", [["F32", [1], [0, 4]]], True)


def safetensors_mutations(whole: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged forms of the safetensors file `whole`: what was done, and the bytes."""
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length], whole[8 + length :]
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        make = draw.choice(list(OF_HEADERS) if draw.random() < 0.7 else list(OF_BYTES))
        if make in OF_HEADERS:
            header = json.loads(text)
            changed, rest = OF_HEADERS[make](header, data, draw)
            raw = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
            content = len(raw).to_bytes(8, "little") + raw + rest
        else:
            content = OF_BYTES[make](text, data, draw)
        yield f"{make} ({seed} {number})", content


def _any(header: Header, draw: random.Random) -> tuple[str, Header]:
    name = draw.choice([key for key in header if key != "__metadata__"])
    return name, header[name]


def _offset(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    entry = _any(header, draw)[1]
    entry["data_offsets"][draw.randrange(2)] = draw.choice(WRONG_NUMBERS)
    return header, data


def _moved(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    entry, by = _any(header, draw)[1], draw.choice((-8, -4, -1, 1, 4, 8))
    entry["data_offsets"] = [place + by for place in entry["data_offsets"]]
    return header, data


def _swapped(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    first, second = _any(header, draw)[1], _any(header, draw)[1]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    return header, data


def _overlap(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    _any(header, draw)[1]["data_offsets"] = list(_any(header, draw)[1]["data_offsets"])
    return header, data


def _backwards(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    _any(header, draw)[1]["data_offsets"].reverse()
    return header, data


def _axis(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    shape = _any(header, draw)[1]["shape"]
    if shape:
        shape[draw.randrange(len(shape))] = draw.choice(WRONG_NUMBERS)
    return header, data


def _axes(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    entry = _any(header, draw)[1]
    shape = entry["shape"]
    entry["shape"] = draw.choice((shape[::-1], [*shape, 1], [1] * 70 + shape, [], shape[:-1]))
    return header, data


def _dtype(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    _any(header, draw)[1]["dtype"] = draw.choice(WRONG_DTYPES)
    return header, data


def _field(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    entry = _any(header, draw)[1]
    field = draw.choice(("dtype", "shape", "data_offsets", "more"))
    if draw.random() < 0.4:
        entry.pop(field, None)
    else:
        entry[field] = draw.choice(WRONG_VALUES)
    return header, data


def _entry(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    name, entry = _any(header, draw)
    header[name] = draw.choice((*WRONG_VALUES, list(entry.values())))
    return header, data


def _name(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    name, _ = _any(header, draw)
    return {draw.choice(WRONG_NAMES) if key == name else key: entry for key, entry in header.items()}, data


def _empty(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    shape = draw.choice(([0], [0, 2**40, 2**40], [2**40, 2**40, 0], [0] * 100, [0, 2**63]))
    place = draw.choice((0, len(data), 1, 2**40))
    name = draw.choice(("extra", "blocks.7.ffn.0.weight"))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place] * 2}
    return header, data


def _dropped(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    """A sound file that lacks tensors."""
    names = [key for key in header if key != "__metadata__"]
    lost = set(draw.sample(names, min(draw.choice((1, 1, 2, 20)), len(names) - 1)))
    kept, rest, end = {}, b"", 0
    for name in sorted(set(names) - lost, key=lambda key: header[key]["data_offsets"][0]):
        begin, stop = header[name]["data_offsets"]
        rest += data[begin:stop]
        kept[name] = {**header[name], "data_offsets": [end, end := end + stop - begin]}
    return kept, rest


def _lost_entry(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    """A header that lacks a tensor whose bytes are there."""
    del header[_any(header, draw)[0]]
    return header, data


def _metadata(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    keys = ("_quantization_metadata", "lora_adapter_metadata", "wancore", "k")
    texts = ("[" * 100_000, "v" * 100_000, "3", "[]", '{"layers": {"a": 3}}', 3, None)
    told = draw.choice((*WRONG_VALUES, *[{key: value} for key in keys for value in texts]))
    header["__metadata__"] = told
    return header, data


def _twice(header: Header, data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    name, entry = _any(header, draw)
    again = draw.choice((entry, {**entry, "shape": [1]}, {}))
    return json.dumps(header).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(again)}}}".encode(), data


def _field_twice(header: Header, data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    return json.dumps(header).encode().replace(b'"dtype": ', b'"dtype": "F32", "dtype": ', draw.choice((1, -1))), data


def _many(header: Header, data: bytes, draw: random.Random) -> tuple[Header, bytes]:
    """Very many tensors, of which none takes a byte."""
    for number in range(draw.choice((100, 1000, 1000, 10_000))):
        header[f"blocks.{number + 4}.ffn.0.bias"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    return header, data


def _other_json(header: Header, data: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    text = json.dumps(header).encode()
    return draw.choice((
        b"{}", b"[]", b"null", b"{", b"", b"[" * 1000, b'{"a":' * 100_000, b" " + text, text + b" " * 99, text + b"\0",
        text + b"{}", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text.replace(b"F32", b"F\xff2"),
        text.replace(b"[0, ", b"[-0, "), text.replace(b"[0, ", b"[0.0, "), text.replace(b"[0, ", b"[0e0, "),
        text.replace(b"[0, ", b"[NaN, "), b'{"a":' + b"1" * 10_000 + b"}",
        b'{"a":{"dtype":"U8","shape":[' + b"1," * 500_000 + b'1],"data_offsets":[0,1]}}',
    )), data  # fmt: skip


OF_HEADERS: dict[str, Callable[[Header, bytes, random.Random], tuple[Header | bytes, bytes]]] = {
    "offset": _offset, "moved": _moved, "swapped": _swapped, "overlap": _overlap, "backwards": _backwards,
    "axis": _axis, "axes": _axes, "dtype": _dtype, "field": _field, "entry": _entry, "name": _name, "empty": _empty,
    "dropped": _dropped, "lost entry": _lost_entry, "metadata": _metadata, "twice": _twice, "field twice": _field_twice,
    "many": _many, "other JSON": _other_json,
}  # fmt: skip


def _whole(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _length(text: bytes, data: bytes, draw: random.Random) -> bytes:
    near = (len(text) - 1, len(text) + 1, len(text) + 8, len(text) + len(data))
    length = draw.choice((0, 1, 2, *near, 2**31, 2**32, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + text + data


def _flipped(text: bytes, data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(text))] = draw.randrange(256)
    return _whole(bytes(changed), data)


def _digit(text: bytes, data: bytes, draw: random.Random) -> bytes:
    places = [place for place, byte in enumerate(text) if 48 <= byte < 58]
    changed = bytearray(text)
    changed[draw.choice(places)] = draw.choice(b"0123456789-. ")
    return _whole(bytes(changed), data)


def _removed(text: bytes, data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(text))
    return _whole(text[:begin] + text[begin + draw.choice((1, 2, 30)) :], data)


def _inserted(text: bytes, data: bytes, draw: random.Random) -> bytes:
    begin, other = draw.randrange(len(text)), draw.randrange(len(text))
    return _whole(text[:begin] + text[other : other + draw.choice((1, 9, 60))] + text[begin:], data)


OF_BYTES: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "length": _length, "flipped bytes": _flipped, "another digit": _digit, "removed": _removed, "inserted": _inserted,
    "cut": lambda text, data, draw: _whole(text, data)[: draw.randrange(8 + len(text) + len(data))],
    "longer": lambda text, data, draw: _whole(text, data) + bytes(draw.choice((1, 8, 4096))),
    "hole": lambda text, data, draw: _whole(text, bytes(draw.choice((1, 8, 64))) + data),
}  # fmt: skip


def pickle_mutations(whole: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged forms of the PyTorch checkpoint `whole`, an archive: in its pickle, its records and its directory."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        kind = draw.choice(("pickle", "pickle", "pickle", "record", "archive", "compressed"))
        yield f"{kind} ({seed} {number})", OF_ARCHIVES[kind](whole, draw)


def _records(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {info.filename: opened.read(info) for info in opened.infolist()}


def _packed(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return stream.getvalue()


def _in_pickle(whole: bytes, draw: random.Random) -> bytes:
    records = _records(whole)
    name = next(name for name in records if name.endswith("/data.pkl"))
    raw = bytearray(records[name])
    for _ in range(draw.choice((1, 1, 3, 12))):
        place, new = draw.randrange(len(raw)), draw.choice(b"}]()tRbaeusqhQc\x85\x86\x87\x88N.KMJX\x8a")
        lost, gained = draw.choice(((1, bytes([draw.randrange(256)])), (1, b""), (0, bytes([new])), (30, b"")))
        raw[place : place + lost] = gained
    return _packed({**records, name: bytes(raw)})


def _in_record(whole: bytes, draw: random.Random) -> bytes:
    records = _records(whole)
    key = draw.choice([name for name in records if "/data/" in name])
    data = records.pop(key)
    if draw.random() < 0.7:
        records[key] = draw.choice((data[:-1], data + bytes(64), b"", data * 2))
    return _packed(records)


def _in_archive(whole: bytes, draw: random.Random) -> bytes:
    raw = bytearray(whole)
    for _ in range(draw.choice((1, 2, 6))):
        raw[draw.choice((draw.randrange(len(raw)), len(raw) - 1 - draw.randrange(200)))] = draw.randrange(256)
    return bytes(raw[: draw.choice((len(raw), len(raw), draw.randrange(len(raw))))])


OF_ARCHIVES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "pickle": _in_pickle, "record": _in_record, "archive": _in_archive,
    "compressed": lambda whole, draw: _packed(_records(whole), zipfile.ZIP_DEFLATED),
}  # fmt: skip
