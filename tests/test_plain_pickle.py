"""Files that torch's safe reader does not read: their tensors come back, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framecap.errors import UnsafePickleError, WeightsError
from framecap.model.plain_pickle import needs_plain_reader, read_plainly
from framecap.model.weights import read_state_dict

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def some_state() -> dict[str, Tensor]:
    """Every dtype, a view, a transposed matrix, a scalar, an empty tensor, a parameter, and two that share memory."""
    torch.manual_seed(0)
    state = {str(dtype).removeprefix("torch."): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    matrix = torch.randn(6, 4)
    state |= {"view": matrix[1:4, ::2], "turned": matrix.t(), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    return state | {"parameter": nn.Parameter(torch.randn(2)), "tied": matrix, "again": matrix}


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_new_pickle_protocols_give_the_same_tensors(tmp_path: Path, protocol: int, zipped: bool) -> None:
    state = some_state()
    content = {"state_dict": OrderedDict(state), "epoch": 3, "optimizer": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    file = tmp_path / "x.pt"
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert needs_plain_reader(file)
    found = read_state_dict(file)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_reads_safely_is_left_to_torch(tmp_path: Path, zipped: bool) -> None:
    torch.save(some_state(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert not needs_plain_reader(tmp_path / "x.pt")


class Scripted(nn.Module):
    """Parameters, buffers, a shared part, attributes of other kinds, and code that must not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.register_buffer("mask", torch.ones(2, 2))
        self.sizes = [1, 2, 3]
        self.names = {"a": 1}
        self.ratio = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.first(x)) * self.ratio


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "script.pt"
    torch.jit.save(torch.jit.script(Scripted()), file)
    return file


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_gives_its_state_dict(torchscript: Path) -> None:
    expected = torch.jit.load(torchscript).state_dict()
    found = read_state_dict(torchscript)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Opener:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def with_pickle(archive: Path, target: Path, data: bytes) -> Path:
    """``archive`` with another data.pkl."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, data if entry.filename.endswith("/data.pkl") else old.read(entry))
    return target


def unsafe_files(folder: Path, torchscript: Path) -> Iterator[Path]:
    """Every form the reader takes, each with a call of os.mkdir in it."""
    content = {"weights": torch.zeros(2), "run": Opener(folder / "ran")}
    for protocol in (4, 5):
        for zipped in (True, False):
            file = folder / f"{protocol}-{zipped}.pt"
            torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            yield file
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps(Opener(folder / "ran"), protocol))
        yield folder / f"{protocol}.pkl"
    yield with_pickle(torchscript, folder / "script.pt", pickle.dumps(Opener(folder / "ran"), 2))


def test_code_in_a_pickle_is_refused_by_name_and_does_not_run(tmp_path: Path, torchscript: Path) -> None:
    for file in unsafe_files(tmp_path, torchscript):
        assert needs_plain_reader(file), file
        with pytest.raises(UnsafePickleError, match=rf"{file.name}.*wants to run code \((posix|nt)\.mkdir\); refused"):
            read_state_dict(file)
    assert not (tmp_path / "ran").exists()


def tensor_pickle(size: object, stride: object, offset: object = 0, numel: object = 4, dtype: str = "Float") -> bytes:
    """A pickle, as torch writes it, of one tensor with these figures in a storage of key 0."""

    def body(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(X\x07\x00\x00\x00storagectorch\n" + dtype.encode() + b"Storage\n"
    storage += body("0") + body("cpu") + body(numel) + b"tQ"
    figures = b"".join(body(value) for value in (offset, size, stride, False, None))
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage + figures + b"tRs."


BAD_FIGURES = {
    "beyond its storage": {"size": (5,), "stride": (1,)},
    "an offset beyond it": {"size": (2,), "stride": (1,), "offset": 3},
    "a negative offset": {"size": (2,), "stride": (1,), "offset": -1},
    "a negative stride": {"size": (2,), "stride": (-1,), "offset": 3},
    "a stride of 0 that makes much of little": {"size": (1 << 40,), "stride": (0,)},
    "more strides than sizes": {"size": (2,), "stride": (1, 1)},
    "a size that is text": {"size": ("2",), "stride": (1,)},
    "a storage longer than its bytes": {"size": (2,), "stride": (1,), "numel": 400},
    "a storage of negative length": {"size": (2,), "stride": (1,), "numel": -4},
    "a type of other width": {"size": (2,), "stride": (1,), "dtype": "Double"},
}


@pytest.mark.parametrize("figures", BAD_FIGURES.values(), ids=list(BAD_FIGURES))
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path: Path, figures: dict[str, Any]) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "good.pt", pickle_protocol=4)
    good = tensor_pickle((2, 2), (2, 1))
    found = read_plainly(with_pickle(tmp_path / "good.pt", tmp_path / "same.pt", good))
    assert torch.equal(found["a"], torch.arange(4.0).view(2, 2))  # type: ignore[index]
    bad = with_pickle(tmp_path / "good.pt", tmp_path / "bad.pt", tensor_pickle(**figures))
    with pytest.raises(WeightsError, match=r"bad\.pt cannot be read"):
        read_plainly(bad)


HOSTILE = {
    "a memo of 16 GB": b"\x80\x02}r\xff\xff\xff\x7f.",
    "an opcode of the copy registry": b"\x80\x02\x82\x01.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "another maker of tensors": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__self__K\x01s\x86b.",
    "a change of OrderedDict": b"\x80\x02ccollections\nOrderedDict\nN}X\x06\x00\x00\x00updateK\x01s\x86b.",
    "no end": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("form", ["zip", "script", "legacy"])
def test_hostile_pickles_are_weights_errors(tmp_path: Path, torchscript: Path, data: bytes, form: str) -> None:
    file = tmp_path / "x.pt"
    if form == "legacy":
        file.write_bytes(b"\x80\x04" + data[2:])
    elif form == "script":
        with_pickle(torchscript, file, data)
    else:
        torch.save({}, tmp_path / "good.pt")
        with_pickle(tmp_path / "good.pt", file, data)
    with pytest.raises(WeightsError):
        read_plainly(file)
    assert callable(OrderedDict.update)


def test_modules_that_hold_one_another_end_in_an_error(tmp_path: Path, torchscript: Path) -> None:
    itself = b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(WeightsError, match="hold one another"):
        read_plainly(with_pickle(torchscript, tmp_path / "x.pt", itself))


@pytest.mark.parametrize("form", ["zip", "script", "legacy"])
def test_damaged_files_are_weights_errors(tmp_path: Path, torchscript: Path, form: str) -> None:
    file, rng = tmp_path / "x.pt", random.Random(1)
    if form == "script":
        whole = torchscript.read_bytes()
    else:
        state = {"a": torch.arange(9.0), "b": torch.ones(2, 3).half()}
        torch.save(state, file, pickle_protocol=4, _use_new_zipfile_serialization=form == "zip")
        whole = file.read_bytes()
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            read_plainly(file)
        except WeightsError:
            refused += 1
    assert refused > 60


def test_a_compressed_archive_is_refused_since_it_could_grow_without_limit(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt", pickle_protocol=4)
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        read_plainly(tmp_path / "y.pt")


def test_a_big_endian_archive_says_so(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt", pickle_protocol=4)
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(WeightsError, match="big-endian"):
        read_plainly(tmp_path / "y.pt")


def test_a_plain_pickle_of_numbers_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": [1.0, 2.0]}, 5))
    with pytest.raises(WeightsError, match=r"torch\.save did not write"):
        read_state_dict(tmp_path / "x.pt")


def test_a_legacy_storage_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a": torch.arange(4.0)}, file, pickle_protocol=4, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    at = data.rindex(struct.pack("<q", 4))
    file.write_bytes(data[:at] + struct.pack("<q", 3) + data[at + 8 :])
    with pytest.raises(WeightsError, match="should have 16"):
        read_plainly(file)
