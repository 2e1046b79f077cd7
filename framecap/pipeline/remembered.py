"""What a caption actor said of the frames it has seen, by the sha256 of their bytes.

The calls of an actor may overlap: a frame that one of them is captioning is waited for by the others, so that equal
bytes are captioned once in an actor, as long as they are among the latest ``MOST`` different ones.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from framecap.model.captioner import Caption

MOST = 20_000  # some 10 MB


class Remembered:
    """Captions by digest; a digest that was claimed and not found is to be settled by whoever claimed it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captions: OrderedDict[bytes, Caption] = OrderedDict()
        self._promised: dict[bytes, Future[Caption | None]] = {}

    def claim(self, digest: bytes) -> Caption | Future[Caption | None] | None:
        """The caption, or that of a call which is making it (None if it fails); None: the caller is to make it."""
        with self._lock:
            if (known := self._captions.get(digest)) is not None:
                self._captions.move_to_end(digest)
                return known
            if (promised := self._promised.get(digest)) is not None:
                return promised
            self._promised[digest] = Future()
            return None

    def settle(self, claimed: Iterable[bytes], made: Mapping[bytes, Caption]) -> None:
        """Fulfil what was claimed; captions that are absent, or are errors, are not kept."""
        with self._lock:
            for digest in claimed:
                caption = made.get(digest)
                usable = caption if caption is not None and caption.status != "error" else None
                if usable is not None:
                    self._captions[digest] = usable
                self._promised.pop(digest).set_result(usable)
            while len(self._captions) > MOST:
                self._captions.popitem(last=False)
