"""Damage to tensors and files of a model's folder: values, headers, indices, links, pipes and pickles."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from damage import ALL, NONE, OUTSIDE, Damage, DoesNotApply
from safetensors.torch import load_file, save_file
from torch import Tensor

MARK = "code-was-run"
"""File beside the damaged folder that a hostile pickle or a repo's own code would make."""
INDEX = "model.safetensors.index.json"


def _weights(folder: Path, random: Random) -> Path:
    files = [path for path in folder.iterdir() if path.name.endswith((".safetensors", ".bin"))]
    if not files:
        raise DoesNotApply
    return random.choice(sorted(files))


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    new = file.with_name("new")
    if file.suffix == ".safetensors":
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, new, metadata={"format": "pt"})
    else:
        torch.save(tensors, new)
    new.replace(file)  # what is mapped must not be written into


def _group(name: str) -> str:
    """The part of a repo that a tensor belongs to: all are damaged equally often, whatever their numbers."""
    name = name.removeprefix("base_model.model.emr.emr_bank.").removeprefix("emr.")
    return name.partition(".")[0]


def _choose(tensors: Mapping[str, Tensor], random: Random, usable: Callable[[Tensor], bool] = lambda t: True) -> str:
    by_group: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if usable(tensor):
            by_group.setdefault(_group(name), []).append(name)
    if not by_group:
        raise DoesNotApply
    return random.choice(by_group[random.choice(sorted(by_group))])


def names_of(tensor: str, file: Path) -> tuple[str, ...]:
    """What an error may call a tensor."""
    plain = tensor.rpartition(".")[2].replace("__", ".")
    part = {_group(tensor)} & {"rescaler", "scale", "mask", "tau", "private"}
    return (tensor, plain, plain.removesuffix(".weight"), file.name, *part)


def remove_tensor(folder: Path, random: Random) -> Damage:
    file = _weights(folder, random)
    tensors = _load(file)
    name = _choose(tensors, random)
    del tensors[name]
    _save(tensors, file)
    return Damage(f"{file.name}: {name} removed", names_of(name, file))


def add_tensor(folder: Path, random: Random) -> Damage:
    file = _weights(folder, random)
    tensors = _load(file)
    like = _choose(tensors, random)
    names = (
        "emr",
        "emr.",
        "model.extra",
        "emr.tau.extra",
        "emr.mask.t9.x",
        "x/../y",
        "",
        "emr.rescaler.t9",
        f"{like}x",
    )
    name = random.choice(names)
    tensors[name] = tensors[like].clone()
    _save(tensors, file)
    return Damage(f"{file.name}: {name!r} added, like {like}", names_of(name, file))


def rename_tensor(folder: Path, random: Random) -> Damage:
    file = _weights(folder, random)
    tensors = _load(file)
    name = _choose(tensors, random)
    new = random.choice([name.upper(), name + ".x", name[:-1], name.replace(".", "", 1), "../" + name])
    tensors[new] = tensors.pop(name)
    _save(tensors, file)
    return Damage(f"{file.name}: {name} called {new}", (*names_of(name, file), new))


SHAPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "twice as long": lambda t: torch.cat([t.reshape(-1)] * 2),
    "without its last element": lambda t: t.reshape(-1)[:-1],
    "flat": lambda t: t.reshape(-1),
    "with a dimension more": lambda t: t[None],
    "empty": lambda t: t.reshape(-1)[:0],
    "(0, 5)": lambda t: t.new_zeros(0, 5),
    "a scalar": lambda t: t.reshape(-1)[0],
    "one element": lambda t: t.reshape(-1)[:1],
    "transposed": lambda t: t.T.contiguous() if t.dim() == 2 else t.reshape(-1, 1),
    "with a row less": lambda t: t[1:] if t.dim() else t[None],
    "with a row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else torch.stack([t, t]),
}


def reshape_tensor(folder: Path, random: Random) -> Damage:
    file = _weights(folder, random)
    tensors = _load(file)
    name = _choose(tensors, random, lambda t: t.numel() > 0)
    label = random.choice(list(SHAPES))
    new = SHAPES[label](tensors[name])
    if new.shape == tensors[name].shape:
        raise DoesNotApply
    tensors[name] = new
    _save(tensors, file)
    return Damage(f"{file.name}: {name} {label}", names_of(name, file))


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
OTHER_DTYPES = (torch.float32, *DTYPES, torch.float8_e4m3fn, torch.complex64)


def cast_tensor(folder: Path, random: Random) -> Damage:
    file = _weights(folder, random)
    tensors = _load(file)
    name = _choose(tensors, random)
    dtype = random.choice([dtype for dtype in OTHER_DTYPES if dtype is not tensors[name].dtype])
    tensors[name] = tensors[name].to(dtype)
    _save(tensors, file)
    return Damage(f"{file.name}: {name} in {dtype}", names_of(name, file))


def cast_input_tensor(folder: Path, random: Random) -> Damage:
    """[`cast_tensor`], where another floating-point type is an input like any other."""
    found = cast_tensor(folder, random)
    other = any(dtype in found.what for dtype in ("float64", "float16", "bfloat16", "float32"))
    return Damage(found.what, found.names, ALL if other else NONE)


def not_finite(folder: Path, random: Random) -> Damage:
    file = _weights(folder, random)
    tensors = _load(file)
    name = _choose(tensors, random, lambda t: t.is_floating_point() and t.numel() > 0)
    value = random.choice([float("nan"), float("inf"), -float("inf")])
    tensors[name] = tensors[name].clone()
    tensors[name].reshape(-1)[random.randrange(tensors[name].numel())] = value
    _save(tensors, file)
    return Damage(f"{file.name}: {value} in {name}", names_of(name, file), frozenset({"push", "cli-push"}))


def spoil_header(folder: Path, random: Random) -> Damage:
    """Change the header of a safetensors file."""
    file = _weights(folder, random)
    if file.suffix != ".safetensors":
        raise DoesNotApply
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    label, new = random.choice(_headers(header, rest, random))
    file.write_bytes(new)
    return Damage(f"{file.name}: {label}", (file.name, file.parent.name, "header"))


def _headers(header: bytes, rest: bytes, random: Random) -> list[tuple[str, bytes]]:
    place = random.randrange(len(header))
    flipped = bytearray(header)
    flipped[place] ^= 1 << random.randrange(8)
    fields = json.loads(header)
    names = [name for name in fields if name != "__metadata__"]
    one, other = random.choice(names), random.choice(names)
    begin, end = fields[one]["data_offsets"]

    def edited(**changes: Any) -> bytes:
        return _with_header(json.dumps({**fields, one: {**fields[one], **changes}}).encode(), rest)

    whole = _with_header(header, rest)
    return [
        *[(f"bit flipped at byte {place} of the header", _with_header(bytes(flipped), rest))] * 6,
        (f"offsets of {one} one too far", edited(data_offsets=[begin + 1, end + 1])),
        (f"offsets of {one} behind the end", edited(data_offsets=[begin + 10**9, end + 10**9])),
        (f"offsets of {one} the wrong way round", edited(data_offsets=[end, begin])),
        (f"offsets of {one} negative", edited(data_offsets=[-8, end - begin - 8])),
        (f"offsets of {one} those of {other}, x", edited(data_offsets=fields[other]["data_offsets"], x=1)),
        (f"shape of {one} [2^62, 4]", edited(shape=[2**62, 4])),
        (f"shape of {one} [-1]", edited(shape=[-1])),
        (f"shape of {one} 'x'", edited(shape="x")),
        (f"dtype of {one} 'X9'", edited(dtype="X9")),
        (f"dtype of {one} null", edited(dtype=None)),
        ("header of 2^63 bytes", struct.pack("<Q", 2**63) + whole[8:]),
        ("header of 0 bytes", struct.pack("<Q", 0) + rest),
        ("header that is no JSON", _with_header(b"x" * len(header), rest)),
        ("header that is a list", _with_header(b"[]", rest)),
        ("header with metadata of another format", _with_header(header.replace(b'"pt"', b'"xx"'), rest)),
        ("cut within the header", whole[: len(header) // 2]),
        ("cut within the data", whole[: len(header) + 8 + random.randrange(len(rest))]),
        ("without its last byte", whole[:-1]),
        ("with bytes behind its end", whole + b"\0" * random.choice([1, 8, 4096])),
        ("of 4 bytes", whole[:4]),
        ("empty", b""),
        ("random bytes", random.randbytes(4096)),
    ]


def _with_header(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def spoil_index(folder: Path, random: Random) -> Damage:
    """Change the index of a sharded checkpoint, or what it points to."""
    path = folder / INDEX
    if not path.is_file():
        raise DoesNotApply
    index = json.loads(path.read_text())
    places = index["weight_map"]
    name, shard = random.choice(sorted(places)), random.choice(sorted(set(places.values())))
    values = (
        None,
        5,
        "",
        f"../{OUTSIDE}/config.json",
        f"../{folder.name}/{places[name]}",
        "nowhere.safetensors",
        [shard],
    )
    value = random.choice([*values, "a\0b", "x" * 5000, "/dev/zero", ".", shard])
    label = random.choice(
        ["value", "value", "value", "name", "extra", "missing", "empty", "no map", "shard", "double"]
    )
    if label == "value":
        places[name] = value
    elif label == "name":
        places[name + ".x"] = places.pop(name)
    elif label == "extra":
        places["extra"] = shard
    elif label == "missing":
        del places[name]
    elif label == "empty":
        places.clear()
    elif label == "no map":
        index["weight_map"] = random.choice([None, [], "x", 5])
    elif label == "shard":
        (folder / shard).unlink()
    else:
        other = folder / random.choice([s for s in sorted(set(places.values())) if s != places[name]])
        _save({**_load(other), name: _load(folder / places[name])[name] + 1}, other)
    path.write_text(json.dumps(index))
    return Damage(f"{INDEX}: {label}: {name} -> {str(value)[:40]!r}, {shard}", (INDEX, shard, name, "index"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def replace_file(folder: Path, random: Random) -> Damage:
    """Something else in the place of a file."""
    file = random.choice(_files(folder))
    outside = folder.parent / OUTSIDE
    content = file.read_bytes()
    label = random.choice([*KINDS])
    file.unlink()
    KINDS[label](file, content, outside)
    place = file.relative_to(folder)
    return Damage(f"{place}: {label}", (file.name, file.parent.name))


def _link_to_copy(file: Path, content: bytes, outside: Path) -> None:
    copy = outside / f"copy-of-{file.name}"
    copy.write_bytes(content)
    file.symlink_to(copy)


def _link_within(file: Path, content: bytes, outside: Path) -> None:
    file.with_name(f"moved-{file.name}").write_bytes(content)
    file.symlink_to(f"moved-{file.name}")


KINDS: Mapping[str, Callable[[Path, bytes, Path], object]] = {
    "missing": lambda file, content, outside: None,
    "empty": lambda file, content, outside: file.write_bytes(b""),
    "cut in half": lambda file, content, outside: file.write_bytes(content[: len(content) // 2]),
    "random bytes": lambda file, content, outside: file.write_bytes(Random(0).randbytes(3000)),
    "a named pipe": lambda file, content, outside: os.mkfifo(file),
    "a folder": lambda file, content, outside: file.mkdir(),
    "a link to a secret outside": lambda file, content, outside: file.symlink_to(outside / "config.json"),
    "a link to its content outside": _link_to_copy,
    "a link to its content within": _link_within,
    "a link to nothing": lambda file, content, outside: file.symlink_to(file.parent / "nowhere"),
    "a link to itself": lambda file, content, outside: file.symlink_to(file.name),
    "a link to /dev/zero": lambda file, content, outside: file.symlink_to("/dev/zero"),
    "a link to a folder outside": lambda file, content, outside: file.symlink_to(outside),
}


def add_file(folder: Path, random: Random) -> Damage:
    """Something beside the files that are known."""
    outside = folder.parent / OUTSIDE
    known = [path for path in folder.iterdir() if path.is_dir()]
    name = random.choice(["notes.txt", "merges.txt", "vocab.json", "extra/notes.txt", "a\nb", "chat_template.jinja"])
    path = folder / name
    if path.exists():
        raise DoesNotApply
    path.parent.mkdir(exist_ok=True)
    label = random.choice(["link", "link to folder", "pipe", "link to device", "loop", "folder for link", "long"])
    if label == "link":
        path.symlink_to(outside / "notes.txt")
    elif label == "link to folder":
        path.symlink_to(outside)
    elif label == "pipe":
        os.mkfifo(path)
    elif label == "link to device":
        path.symlink_to("/dev/zero")
    elif label == "loop":
        path.symlink_to(folder)
    elif label == "long":
        path = folder / ("x" * 250)
        path.write_text("")
    else:
        path = random.choice(known) if known else folder / "tasks"
        shutil.rmtree(path, ignore_errors=True)
        path.symlink_to(outside)
    return Damage(f"{path.name!r}: {label} added", (path.name,))


class _Hostile:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def spoil_pickle(folder: Path, random: Random) -> Damage:
    """A `.bin` file that holds code, or no tensors."""
    files = list(folder.glob("*.bin"))
    file = files[0] if files else folder / "pytorch_model.bin"
    if not files:
        single = folder / "adapter_model.safetensors"
        file = folder / "adapter_model.bin" if single.exists() else file
        tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    else:
        tensors = torch.load(file, weights_only=True)
    hostile, name = _Hostile(folder.parent / MARK), next(iter(tensors))
    contents: Mapping[str, Any] = {
        "code": hostile,
        "code among tensors": {**tensors, "x": hostile},
        "a list": list(tensors.values()),
        "numbers for names": dict(enumerate(tensors.values())),
        "a number for a tensor": {**tensors, name: 5},
        "a sparse tensor": {**tensors, name: torch.eye(4).to_sparse()},
        "a tensor on no device": {**tensors, name: torch.empty(4, device="meta")},
        "mappings in mappings": {"state_dict": {"model": tensors}},
        "an expanded tensor": {**tensors, name: torch.zeros(1).expand(10**6, 10**6)},
        "nothing": {},
    }
    label = random.choice(["plain code", "cut", "no pickle", "a zip of other files", *contents])
    if label in contents:
        torch.save(contents[label], file)
    elif label == "plain code":
        file.write_bytes(pickle.dumps(hostile))
    elif label == "a zip of other files":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.txt", "x")
    else:
        torch.save(tensors, file)
        content = file.read_bytes()
        file.write_bytes(content[: random.randrange(len(content))] if label == "cut" else random.randbytes(5000))
    return Damage(f"{file.name}: {label}", (file.name, name))
