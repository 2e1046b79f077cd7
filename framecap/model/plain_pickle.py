"""Tensors of torch files that ``torch.load(weights_only=True)`` does not read, without running what they hold.

Two kinds: TorchScript archives (the only form of OpenAI's CLIP), which ``torch.jit.load`` would compile and run, and
files saved with pickle protocol 4 or 5, whose opcodes torch's safe reader does not know. Here a pickle makes plain
containers and records of tensors, and may name nothing but what ``_Unpickler.find_class`` lists; a global outside that
list is refused. The tensors are read afterwards, from storages whose sizes are checked.

Formats: pytorch's ``torch/serialization.py`` (zip files and the older format) and
``torch/csrc/jit/serialization/pickler.cpp`` (TorchScript).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from framecap.errors import UnsafePickleError, WeightsError

_ZIP_START = b"PK\x03\x04"
_NEW_PROTOCOLS = (b"\x80\x04", b"\x80\x05")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_MODULES, _LONGEST_NAME = 100_000, 2_000
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What picklers of protocols 2 to 5 write for containers, numbers, texts and calls. No EXT, INST, OBJ, NEWOBJ_EX or
# out-of-band buffers.
_OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP",
    "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
})  # fmt: skip
# What reading damaged or hostile bytes raises.
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, ValueError, LookupError, TypeError,
    AttributeError, EOFError, RuntimeError, MemoryError, OverflowError,
)  # fmt: skip

class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Stored(NamedTuple):
    """A tensor as the pickle describes it; nothing of it has been checked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


def needs_plain_reader(file: Path) -> bool:
    """Whether ``file`` is a TorchScript archive or a torch file of pickle protocol 4 or 5."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if start != _ZIP_START:
        return start[:2] in _NEW_PROTOCOLS
    try:
        with zipfile.ZipFile(file) as archive:
            root = _root(archive)
            if _is_torchscript(archive, root):
                return True
            with archive.open(f"{root}/data.pkl") as stream:
                return stream.read(2) in _NEW_PROTOCOLS
    except _DAMAGE:
        return False  # damaged: torch says how


def read_plainly(file: Path) -> object:
    """What ``file`` holds, with CPU tensors; of a TorchScript archive the state dict of its module.

    Raises UnsafePickleError for a pickle that names anything but tensors and containers, WeightsError for a damaged
    file.
    """
    try:
        with file.open("rb") as stream:
            is_zip = stream.read(4) == _ZIP_START
            stream.seek(0)
            return _read_zip(stream, file) if is_zip else _read_legacy(stream, file)
    except (RecursionError, *_DAMAGE) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"{file} cannot be read ({reason}); fetch it again.") from error


def _read_zip(stream: BinaryIO, file: Path) -> object:
    with zipfile.ZipFile(stream) as archive:
        root = _root(archive)
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder").strip() != b"little":
            raise WeightsError(f"{file} was saved on a big-endian machine, which is not supported; save it on another.")

        def stored(name: str) -> bytes:
            entry = archive.getinfo(f"{root}/{name}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which torch never does")
            return archive.read(entry)

        scripted = _is_torchscript(archive, root)
        content = _unpickle(io.BytesIO(stored("data.pkl")), file, scripted)
        reader = _TensorReader(lambda key: stored(f"data/{key}"))
        return reader.module_state(content) if scripted else reader.plain(content)


def _read_legacy(stream: BinaryIO, file: Path) -> object:
    """The format before zip files: five pickles, then the storages, each after its length (int64) in elements."""
    if _unpickle(stream, file) != _LEGACY_MAGIC:
        raise WeightsError(f"{file} is a pickle that torch.save did not write; save its tensors with torch.save.")
    for _ in ("format version", "system"):
        _unpickle(stream, file)
    content = _unpickle(stream, file)
    keys = _unpickle(stream, file)
    sizes = {storage.key: storage.dtype.itemsize for storage in _storages(content)}
    if not isinstance(keys, list) or set(keys) != set(sizes):
        raise ValueError("its storages are not those its tensors name")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        (numel,) = struct.unpack("<q", stream.read(8))
        places[key] = (stream.tell(), numel * sizes[key])
        stream.seek(numel * sizes[key], io.SEEK_CUR)

    def stored(key: str) -> bytes:
        start, length = places[key]
        stream.seek(start)
        return stream.read(length)

    return _TensorReader(stored).plain(content)


def _storages(content: object) -> list[_Storage]:
    """All storages that tensors anywhere in ``content`` name."""
    found: list[_Storage] = []
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _Storage):
            found.append(value)
        elif isinstance(value, dict):
            waiting += [*value.values(), *vars(value).values()] if hasattr(value, "__dict__") else value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return found


def _root(archive: zipfile.ZipFile) -> str:
    """The one folder that all of a torch archive lies in."""
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        raise ValueError("it is no archive of torch: data.pkl is missing")
    return roots[0]


def _is_torchscript(archive: zipfile.ZipFile, root: str) -> bool:
    return f"{root}/constants.pkl" in archive.namelist()


def _unpickle(stream: BinaryIO, file: Path, scripted: bool = False) -> object:
    """One pickle at the place of ``stream``, which stands behind it afterwards."""
    start = stream.tell()
    highest = 0
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in _OPCODES:
            raise ValueError(f"pickle opcode {opcode.name} is not expected in a checkpoint")
        if opcode.name == "LONG_BINPUT" and argument is not None:
            highest = max(highest, argument)
    end = stream.tell()
    if highest > end - start:  # the unpickler would reserve that many places
        raise ValueError(f"its pickle has {end - start} bytes and wants to keep {highest} objects")
    stream.seek(start)
    return _Unpickler(io.BytesIO(stream.read(end - start)), file, scripted).load()


class _Unpickler(pickle.Unpickler):
    """Containers, numbers, texts and ``_Stored`` records.

    All that a pickle can call are methods of this object and ``OrderedDict``: neither has attributes it could change.
    A module of TorchScript becomes an ``OrderedDict`` whose ``__dict__`` holds its attributes.
    """

    def __init__(self, stream: BinaryIO, file: Path, scripted: bool) -> None:
        super().__init__(stream)
        self._file, self._scripted = file, scripted

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._first,
            ("torch", "Size"): tuple,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if self._scripted and module.split(".")[0] == "__torch__":
            return OrderedDict
        if self._scripted and module == "torch.jit._pickle":  # build_intlist, restore_type_tag and the like
            return self._first
        raise UnsafePickleError(
            f"{self._file} is a pickle that wants to run code ({module}.{name}); refused. "
            "Save it again as tensors only, best as model.safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        known = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not known or pid[5:] not in ((), (None,)):  # the sixth is a view of another storage, long gone
            raise pickle.UnpicklingError("a storage is described in an unknown way")
        return _Storage(pid[1], pid[2], pid[4])

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Stored:
        return _Stored(storage, offset, size, stride)

    def _first(self, value: Any, *_: Any) -> Any:
        return value


class _TensorReader:
    """``_Stored`` records → tensors; each storage is read once."""

    def __init__(self, stored: Callable[[str], bytes]) -> None:
        self._stored = stored
        self._storages: dict[str, Tensor] = {}
        self._made: dict[int, Any] = {}

    def plain(self, value: Any) -> Any:
        """``value`` with tensors in place of records, in dicts, lists and tuples."""
        if isinstance(value, _Stored):
            return self._tensor(value)
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in self._made:
            if isinstance(value, dict):
                self._made[id(value)] = {key: self.plain(item) for key, item in value.items()}
            else:
                self._made[id(value)] = [self.plain(item) for item in value]
        return self._made[id(value)]

    def module_state(self, module: Any) -> dict[str, Tensor]:
        """Parameters and buffers of a TorchScript module, by the names that its ``state_dict()`` gives."""
        if not isinstance(module, OrderedDict):
            raise ValueError("its data.pkl holds no module")
        state: dict[str, Tensor] = {}
        waiting, seen = [("", module)], 0
        while waiting:
            prefix, part = waiting.pop()
            seen += 1
            if seen > _MOST_MODULES or len(prefix) > _LONGEST_NAME:
                raise ValueError("its modules hold one another")
            for name, value in vars(part).items():
                if isinstance(value, _Stored):
                    state[prefix + name] = self._tensor(value)
                elif isinstance(value, OrderedDict):
                    waiting.append((f"{prefix}{name}.", value))
        return state

    def _tensor(self, record: _Stored) -> Tensor:
        storage, offset, size, stride = record
        numbers = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor's place in its storage is no number")
        elements = 1
        for length in size:
            elements *= length
        flat = self._storage(storage)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if elements and (last >= len(flat) or elements > len(flat)):
            raise ValueError(f"a tensor of shape {list(size)} lies beyond its storage of {len(flat)} elements")
        return flat.as_strided(size, stride, offset) if elements else flat.new_empty(size)

    def _storage(self, storage: _Storage) -> Tensor:
        dtype, key, numel = storage
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(numel) is not int:
            raise ValueError("a storage is described in an unknown way")
        if key not in self._storages:
            length = numel * dtype.itemsize
            data = bytearray(self._stored(key))
            if len(data) != length or sys.byteorder != "little":
                raise ValueError(f"storage {key} has {len(data)} bytes and should have {length}")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if self._storages[key].dtype is not dtype:
            raise ValueError(f"storage {key} is read as {dtype} and as {self._storages[key].dtype}")
        return self._storages[key]
