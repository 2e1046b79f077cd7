"""A store that fails for a while costs what it hid, never the run: backends raise errors that are no OSErrors."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem
from shards import caption, shard_table, without_ray, write_shards

from framecap import stores
from framecap.errors import StorageError, StoreUnavailableError
from framecap.pipeline import fragments, publish
from framecap.pipeline.fragments import list_fragments
from framecap.pipeline.plan import Piece
from framecap.pipeline.read import _ShardStream
from framecap.pipeline.run import main
from framecap.pipeline.summary import Summary
from framecap.shards import open_shard

__all__ = ["without_ray"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_ray")
OPERATIONS = ("_open", "cat_file", "info", "pipe_file", "put_file", "rm_file")


class Outage:
    """Which calls of the store fail now: ``fails(operation, path)``; ``calls`` are those that did."""

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool] = lambda operation, path: False
        self.calls: list[tuple[str, str]] = []

    def meet(self, operation: str, path: str) -> None:
        if self.fails(operation, path):
            self.calls.append((operation, path))
            raise EndpointConnectionError(endpoint_url=f"http://store{path}")


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    """Three shards of six frames at ``memory://in``, in a store that fails on demand."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    outage = Outage()

    def failing(operation: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(fs: MemoryFileSystem, path: str, *rest: Any, **options: Any) -> Any:
            outage.meet(operation, f"{path} {rest[0] if operation == 'put_file' else ''}".strip())
            return original(fs, path, *rest, **options)

        return call

    for operation in OPERATIONS:
        monkeypatch.setattr(MemoryFileSystem, operation, failing(operation, getattr(MemoryFileSystem, operation)))
    monkeypatch.setattr("framecap.stores.PATIENCE", 0.0)
    monkeypatch.setattr("framecap.pipeline.fragments._RETRY_WAITS", (0.0, 0.0))
    monkeypatch.setattr("framecap.pipeline.read._RETRY_WAITS", (0.0,) * 5)
    for name in "abc":
        sink = io.BytesIO()
        pq.write_table(shard_table(name, 6, ord(name)), sink, row_group_size=2)
        MemoryFileSystem().pipe_file(f"/in/{name}.parquet", sink.getvalue())
    return outage


def run(captioner: Path, **settings: Any) -> Summary:
    return caption("memory://in", "memory://out", captioner, **{"batch_size": 3, **settings})


def published() -> list[str]:
    return sorted(path.removeprefix("/out/") for path in MemoryFileSystem().find("/out") if path.endswith(".parquet"))


@pytest.mark.parametrize("operation", ["_open", "info"])
def test_a_shard_that_cannot_be_reached_fails_alone(outage: Outage, operation: str, tiny_captioner_dir: Path) -> None:
    begun: list[str] = []

    def fails(name: str, path: str) -> bool:  # the footer is read in the plan: fail after that
        begun.extend([path] if (name, path) == ("_open", "/in/b.parquet") else [])
        return (name, path) == (operation, "/in/b.parquet") and bool(begun)

    outage.fails = fails
    summary = run(tiny_captioner_dir)
    assert outage.calls
    assert (summary.exit_code, list(summary.failed_shards)) == (75, ["b.parquet"])
    assert summary.failed_shards["b.parquet"].startswith("unavailable: ")
    assert "run the same command again" in summary.failed_shards["b.parquet"]
    assert published() == ["a.parquet", "c.parquet"]
    outage.fails = lambda operation, path: False
    assert run(tiny_captioner_dir).exit_code == 0
    assert published() == ["a.parquet", "b.parquet", "c.parquet"]


def test_a_read_that_fails_half_way_is_an_os_error(outage: Outage, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            outage.meet("read", "")
            return super().read(size)

    data = MemoryFileSystem().cat_file("/in/a.parquet")
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda fs, path, *rest, **options: Broken(data))
    with open_shard("memory://in", "a.parquet") as shard:
        outage.fails = lambda operation, path: operation == "read"
        with pytest.raises(OSError, match="EndpointConnectionError"):
            shard.read()


def test_a_shard_that_cannot_be_read_to_its_end_keeps_the_captions_it_has(
    outage: Outage, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _ShardStream.rows

    def breaks_off(stream: _ShardStream, piece: Piece) -> Iterator[pa.RecordBatch]:
        if (piece.shard, piece.start) == ("b.parquet", 3):
            raise OSError("SlowDown: please reduce your request rate")
        yield from whole(stream, piece)

    with monkeypatch.context() as patch:
        patch.setattr(_ShardStream, "rows", breaks_off)
        summary = run(tiny_captioner_dir, batch_size=1)
    assert (summary.exit_code, summary.captioned_rows) == (3, 17)
    again = run(tiny_captioner_dir, batch_size=1)
    assert (again.exit_code, again.recovered_rows, again.captioned_rows) == (0, 5, 1)
    assert list_fragments("memory://out/_framecap/fragments") == []


def test_a_shard_that_was_replaced_leaves_no_fragment(
    outage: Outage, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        marks = iter(["another"])
        now = publish.mark_of
        patch.setattr(publish, "mark_of", lambda uri: next(marks, None) or now(uri))
        assert next(iter(run(tiny_captioner_dir).failed_shards.values())).startswith("changed: ")
    assert list_fragments("memory://out/_framecap/fragments") == []


def test_a_fragment_that_cannot_be_written_at_once_is_written_later(outage: Outage, tiny_captioner_dir: Path) -> None:
    outage.fails = lambda operation, path: path.endswith(".fragment") and operation == "pipe_file" and refused()
    remaining = [True, True]

    def refused() -> bool:
        return bool(remaining) and remaining.pop()

    assert run(tiny_captioner_dir).exit_code == 0
    assert len(outage.calls) == 2


def test_a_fragment_that_cannot_be_written_costs_its_shard(outage: Outage, tiny_captioner_dir: Path) -> None:
    outage.fails = lambda operation, path: path.endswith(".fragment") and operation == "pipe_file" and first(path)
    seen: list[str] = []

    def first(path: str) -> bool:
        seen.append(path)
        return path == seen[0]

    summary = run(tiny_captioner_dir)
    assert (summary.exit_code, summary.captioned_rows) == (75, 15)
    assert summary.failed_shards["a.parquet"].startswith("unavailable: ")
    assert published() == ["b.parquet", "c.parquet"]


def test_a_shard_that_cannot_be_published_keeps_its_fragments(outage: Outage, tiny_captioner_dir: Path) -> None:
    outage.fails = lambda operation, path: operation == "put_file" and path.endswith("/out/b.parquet")
    summary = run(tiny_captioner_dir)
    assert (summary.exit_code, summary.published_shards) == (75, 2)
    assert summary.failed_shards["b.parquet"].startswith("unavailable: ")
    outage.fails = lambda operation, path: False
    again = run(tiny_captioner_dir)
    assert (again.exit_code, again.captioned_rows, again.recovered_rows) == (0, 0, 6)


def test_fragments_that_cannot_be_deleted_wait_for_the_next_run(outage: Outage, tiny_captioner_dir: Path) -> None:
    outage.fails = lambda operation, path: operation == "rm_file" and path.endswith(".fragment")
    assert run(tiny_captioner_dir).exit_code == 0
    outage.fails = lambda operation, path: False
    assert list_fragments("memory://out/_framecap/fragments")
    assert run(tiny_captioner_dir).captioned_rows == 0
    assert list_fragments("memory://out/_framecap/fragments") == []


def test_a_ledger_that_cannot_be_written_now_is_written_at_the_end(
    outage: Outage, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framecap.pipeline.ledger._FLUSH_LINES", 1)
    outage.fails = lambda operation, path: operation == "pipe_file" and "/ledger/" in path
    assert run(tiny_captioner_dir).exit_code == 0
    assert outage.calls
    assert b"c.parquet" in MemoryFileSystem().cat_file("/out/_framecap/ledger.jsonl")


def test_a_state_that_cannot_be_tidied_is_tidied_by_the_next_run(outage: Outage, tiny_captioner_dir: Path) -> None:
    outage.fails = lambda operation, path: operation == "pipe_file" and path.endswith("/ledger.jsonl")
    summary = run(tiny_captioner_dir)
    assert (summary.exit_code, summary.published_shards, len(outage.calls)) == (0, 3, 1)
    outage.fails = lambda operation, path: False
    assert run(tiny_captioner_dir).shards_done_before == 3


def test_a_run_whose_summary_cannot_be_written_ends_as_it_ended(outage: Outage, tiny_captioner_dir: Path) -> None:
    outage.fails = lambda operation, path: operation == "pipe_file" and not path.endswith(("/lock", "/input.json"))
    summary = run(tiny_captioner_dir)
    assert (summary.exit_code, len(summary.failed_shards)) == (75, 3)
    assert any(path.endswith("/summary.json") for _, path in outage.calls)


def test_a_store_that_is_out_stops_the_run_instead_of_costing_every_shard(
    outage: Outage, tiny_captioner_dir: Path
) -> None:
    """Once a fragment cannot be written and OUT does not answer, nothing more is captioned."""
    outage.fails = lambda operation, path: path.startswith("/out") and not path.endswith("/lock") and is_out(path)
    seen: list[str] = []

    def is_out(path: str) -> bool:
        seen.extend([path] if path.endswith(".fragment") else [])
        return bool(seen)

    summary = run(tiny_captioner_dir)
    assert (summary.exit_code, summary.captioned_rows, len(summary.failed_shards)) == (75, 0, 1)
    assert summary.stopped is not None
    assert "the store of memory://out does not answer" in summary.stopped
    outage.fails = lambda operation, path: False
    assert run(tiny_captioner_dir).exit_code == 0
    assert published() == ["a.parquet", "b.parquet", "c.parquet"]


@pytest.mark.parametrize("place", ["/in", "/out", "/out/_framecap/ledger.jsonl"])
def test_a_store_that_is_out_before_the_start_says_run_again(
    outage: Outage, place: str, tiny_captioner_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny_captioner_dir)
    outage.fails = lambda operation, path: path.startswith(place) and not path.endswith("/lock")
    flags = ["--input-uri", "memory://in", "--output-uri", "memory://out", "--captioner", str(tiny_captioner_dir)]
    assert main(flags) == 75
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "run the same command again" in line


def test_a_full_disk_stops_the_run_before_more_is_captioned(
    tmp_path: Path, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "in", shards=3, rows=6)
    write = fragments.write_bytes_atomic

    def full(uri: str, data: bytes) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StorageError(f"{uri} cannot be written: {error}") from error

    monkeypatch.setattr(fragments, "write_bytes_atomic", full)
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, batch_size=3)
    assert (summary.exit_code, summary.captioned_rows, len(summary.failed_shards)) == (75, 0, 1)
    assert summary.stopped is not None
    assert "no space is left" in summary.stopped
    monkeypatch.setattr(fragments, "write_bytes_atomic", write)
    assert caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, batch_size=3).exit_code == 0


def test_a_disk_that_is_full_at_the_start_says_run_again(
    tmp_path: Path, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("framecap.pipeline.lock._create_file", full)
    flags = ["--input-uri", str(tmp_path / "in"), "--output-uri", str(tmp_path / "out")]
    assert main([*flags, "--captioner", str(tiny_captioner_dir)]) == 75
    assert "No space left on device" in capfd.readouterr().err


def test_a_shard_that_does_not_fit_the_disk_is_no_fault_of_its_own() -> None:
    # Through a stream: write_table removes a path that it failed to write, even a device.
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb") as full:
        pq.write_table(shard_table("a", 2000), full)
    assert stores.failure_kind(caught.value, "unwritable") == "no_space"


def test_a_store_that_slows_down_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowDownError(Exception):
        response: ClassVar = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}

    waited: list[float] = []
    monkeypatch.setattr(stores.time, "monotonic", lambda: sum(waited))
    monkeypatch.setattr(stores.time, "sleep", waited.append)

    class Store:
        def cat_file(self, path: str) -> bytes:
            if sum(waited) < 120:
                raise OSError(errno.EBUSY, "Please reduce your request rate.") from SlowDownError()
            return b"at last"

        def ls(self, path: str) -> list[str]:
            raise SlowDownError

    assert stores.Guarded(Store(), stores.PATIENCE).cat_file("/a") == b"at last"
    assert 120 <= sum(waited) <= stores.PATIENCE
    waited.clear()
    store = Store()
    guarded = stores.Guarded(store, stores.PATIENCE)
    with pytest.raises(StoreUnavailableError, match="run the same command again"):
        guarded.ls("/a")
    assert 120 <= sum(waited) <= stores.PATIENCE
    before = sum(waited)
    with pytest.raises(StoreUnavailableError):
        guarded.ls("/a")
    assert sum(waited) == before, "it has been waited for already"


@pytest.mark.parametrize("error", [PermissionError("403"), FileNotFoundError("404"), FileExistsError("412")])
def test_an_answer_is_no_outage(error: OSError) -> None:
    class Store:
        def info(self, path: str) -> dict[str, str]:
            raise error

    with pytest.raises(type(error)):
        stores.Guarded(Store(), 60.0).info("/a")
