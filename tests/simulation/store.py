"""An object store in memory: objects appear whole, may be created only if they are not there, and have no rename.

Listings may lag behind. What goes wrong with each operation, the world decides. Registered as ``sim://``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from simulation.world import World, transient

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One object."""

    data: bytes
    etag: str
    written: float


class Objects:
    """The objects of a world. ``lag``: seconds that listings may be behind; ``strict_delete``: deleting what is not
    there is an error."""

    def __init__(self, world: World, lag: float = 0.0, strict_delete: bool = True) -> None:
        self.world, self.lag, self.strict_delete = world, lag, strict_delete
        self.things: dict[str, Thing] = {}
        self.on_write: list[Callable[[str], None]] = []
        self._changes: list[tuple[float, str, Thing | None]] = []  # what listings do not show yet
        self.instances: dict[str, SimFileSystem] = {}

    def put(self, path: str, data: bytes) -> None:
        """Write one object."""
        thing = Thing(bytes(data), hashlib.md5(data).hexdigest(), self.world.now)
        self._hide(path)
        self.things[path] = thing
        for hook in self.on_write:
            hook(path)

    def delete(self, path: str) -> None:
        """Delete one object."""
        if path in self.things:
            self._hide(path)
            del self.things[path]
        elif self.strict_delete:
            raise FileNotFoundError(path)

    def _hide(self, path: str) -> None:
        if self.lag:
            until = self.world.now + self.world.chance.uniform(0, self.lag)
            self._changes.append((until, path, self.things.get(path)))

    def listed(self) -> dict[str, Thing]:
        """What a listing shows now."""
        shown = dict(self.things)
        if self.lag:
            self._changes = [change for change in self._changes if change[0] > self.world.now]
            for _, path, before in reversed(self._changes):
                if before is None:
                    shown.pop(path, None)
                else:
                    shown[path] = before
        return dict(sorted(shown.items()))


class _OnePerProcess(type(AbstractFileSystem)):  # type: ignore[misc]
    """A process keeps its file system as long as it lives: the product remembers which have given up."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        objects: Objects = cls.objects  # type: ignore[attr-defined]
        process = objects.world.current.process
        name = process.name if process is not None else ""
        if name not in objects.instances:
            objects.instances[name] = super().__call__(*arguments, skip_instance_cache=True, **options)
        return objects.instances[name]


class SimFileSystem(AbstractFileSystem, metaclass=_OnePerProcess):
    """``sim://bucket/key`` of the present world."""

    protocol = "sim"
    objects: ClassVar[Objects]

    def _operate(self, name: str, path: str, effect: Callable[[], T]) -> T:
        return self.objects.world.operate(name, path, effect, transient)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return self._operate("info", path, lambda: self._info(self._strip_protocol(path)))

    def _info(self, path: str) -> dict[str, Any]:
        thing = self.objects.things.get(path)
        if thing is not None:
            return _described(path, thing)
        if any(name.startswith(f"{path}/") for name in self.objects.listed()):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def modified(self, path: str) -> datetime:
        return self.info(path)["LastModified"]

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        found = self._operate("ls", path, lambda: self._ls(self._strip_protocol(path)))
        return found if detail else [info["name"] for info in found]

    def _ls(self, path: str) -> list[dict[str, Any]]:
        listed = self.objects.listed()
        if path in listed:
            return [_described(path, listed[path])]
        found: dict[str, dict[str, Any]] = {}
        for name, thing in listed.items():
            if name.startswith(f"{path}/"):
                first, _, below = name[len(path) + 1 :].partition("/")
                place = f"{path}/{first}"
                found[place] = {"name": place, "size": 0, "type": "directory"} if below else _described(name, thing)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values())

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        def effect() -> dict[str, dict[str, Any]]:
            prefix = f"{self._strip_protocol(path)}/"
            return {
                name: _described(name, thing)
                for name, thing in self.objects.listed().items()
                if name.startswith(prefix) and (maxdepth is None or name[len(prefix) :].count("/") < maxdepth)
            }

        found = self._operate("find", path, effect)
        return found if detail else list(found)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        return self._operate("get", path, lambda: self._thing(path).data[start:end])

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return self._operate("open", path, lambda: io.BytesIO(self._thing(path).data))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return self._open(path, mode)

    def _thing(self, path: str) -> Thing:
        path = self._strip_protocol(path)
        if path not in self.objects.things:
            raise FileNotFoundError(path)
        return self.objects.things[path]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        def effect() -> None:
            if mode == "create" and self._strip_protocol(path) in self.objects.things:
                raise FileExistsError(path)
            self.objects.put(self._strip_protocol(path), value)

        self._operate("create" if mode == "create" else "put", path, effect)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        data = Path(lpath).read_bytes()
        self._operate("put", rpath, lambda: self.objects.put(self._strip_protocol(rpath), data))

    def rm_file(self, path: str) -> None:
        self._operate("delete", path, lambda: self.objects.delete(self._strip_protocol(path)))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for name in self.find(path):
            self.rm_file(name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        return

    def invalidate_cache(self, path: str | None = None) -> None:
        return


def _described(path: str, thing: Thing) -> dict[str, Any]:
    return {
        "name": path,
        "size": len(thing.data),
        "type": "file",
        "ETag": f'"{thing.etag}"',
        "LastModified": datetime.fromtimestamp(thing.written, UTC),
    }


fsspec.register_implementation("sim", SimFileSystem, clobber=True)
