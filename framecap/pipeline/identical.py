"""Captions by the bytes of their frames, so that an actor captions frames with identical bytes once.

Chunks that are worked on at the same time know of each other's frames: what one is captioning, the other awaits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from framecap.model.captioner import Caption

_REMEMBERED = 20_000  # captions


@dataclass(frozen=True)
class Claim:
    """Of a chunk's slots: ``known`` have captions, ``own`` are the chunk's to caption, ``awaited`` another's."""

    known: dict[int, Caption]
    own: list[int]
    awaited: dict[int, threading.Event]


class CaptionMemory:
    """The captions that an actor made last, by digest of the encoded frame; for several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captions: OrderedDict[bytes, Caption] = OrderedDict()
        self._under_way: dict[bytes, threading.Event] = {}

    @contextmanager
    def claim(self, digests: Mapping[int, bytes]) -> Iterator[Claim]:
        """Within it the chunk captions ``Claim.own``, and must wait for nobody; whoever awaits these goes on after."""
        claim, done = Claim({}, [], {}), threading.Event()
        with self._lock:
            for slot, digest in digests.items():
                if digest in self._captions:
                    claim.known[slot] = self._recall(digest)
                elif digest in self._under_way:
                    claim.awaited[slot] = self._under_way[digest]
                else:
                    claim.own.append(slot)
                    self._under_way[digest] = done
        try:
            yield claim
        finally:
            with self._lock:
                for slot in claim.own:
                    del self._under_way[digests[slot]]
            done.set()

    def await_others(self, claim: Claim, digests: Mapping[int, bytes]) -> dict[int, Caption]:
        """The captions of ``claim.awaited`` as soon as others have made them; without those that they could not."""
        for event in claim.awaited.values():
            event.wait()
        with self._lock:
            return {slot: self._recall(digests[slot]) for slot in claim.awaited if digests[slot] in self._captions}

    def remember(self, digests: Mapping[int, bytes], captions: Mapping[int, Caption]) -> None:
        """Keep the captions of slots that have one; what failed is tried again."""
        with self._lock:
            for slot, caption in captions.items():
                if caption.status != "error":
                    self._captions[digests[slot]] = caption
            while len(self._captions) > _REMEMBERED:
                self._captions.popitem(last=False)

    def _recall(self, digest: bytes) -> Caption:
        self._captions.move_to_end(digest)
        return self._captions[digest]
