"""Pictures decoded in a child process, which the kernel ends when one takes too long.

Decoders are C code that neither a thread nor a signal handler of Python can interrupt, so a picture that makes one
loop would hold its reader for ever, and every rerun. The child arms the kernel's alarm clock before each picture,
leaves SIGALRM to its default action (the process ends), and bounds its own memory: what it does not survive becomes
the ``FrameError`` of that picture, and the next one gets a new child. Plain JPEGs are decoded by the caller itself:
libjpeg-turbo's time follows from the size of picture and file, and there are millions of them.

Imports no torch: a child starts in a fifth of a second. Knows nothing of frames or shards.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any, BinaryIO, cast

import numpy as np

from framecap.errors import FrameError
from framecap.model.jpeg import check_jpeg, decode_jpeg
from framecap.model.picture_limits import DEFAULT_LIMITS, PictureLimits, check_bytes
from framecap.model.pictures import Decode, decode_with_pillow, fit_within, installed_formats, resize
from framecap.model.resample import Pixels

_START_SECONDS = 120  # for the child's imports, on a disk that is asleep
_SLACK_BYTES = 96 << 20  # memory of a child beside the picture's buffers
# The parent's own search path: it may be the doing of Ray or of a notebook.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from framecap.model.decoder_process import serve; serve(json.loads(sys.argv[2]))"
)


class PictureDecoder:
    """Decodes pictures within ``limits``, for several threads at once (which take turns with the child)."""

    def __init__(self, limits: PictureLimits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process that started the child; a fork must not use its pipes
        atexit.register(self.close)

    def crop_and_resize(self, data: bytes, resolution: int, decode: Decode = "exact") -> Pixels:
        """``pictures.crop_and_resize`` of encoded bytes: uint8 [R, R, 3].

        Raises FrameError, also of kind too_slow.
        """
        check_bytes(len(data), self.limits)
        pixels = decode_jpeg(data, resolution if decode == "fast" else None, self.limits, plain=True)
        if pixels is not None:
            return resize(pixels, resolution)
        return self._ask(data, {"do": "square", "resolution": resolution, "decode": decode})

    def fit_within(self, data: bytes, side: int) -> Pixels:
        """The whole picture, reduced to at most ``side`` pixels on its long side. Raises FrameError."""
        check_bytes(len(data), self.limits)
        pixels = decode_jpeg(data, side, self.limits, plain=True)
        return fit_within(pixels, side) if pixels is not None else self._ask(data, {"do": "fit", "side": side})

    def size(self, data: bytes) -> tuple[int, int]:
        """(width, height) of a picture that can be decoded to its end. Raises FrameError."""
        check_bytes(len(data), self.limits)
        known = check_jpeg(data, self.limits)
        if known is not None:
            return known
        width, height = self._ask(data, {"do": "size"}).tolist()
        return width, height

    def close(self) -> None:
        """End the child; the next picture starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            _discard(child)

    def _ask(self, data: bytes, request: dict[str, Any]) -> Pixels:
        """What the child answers; of one that dies by itself (the system may be out of memory) once more."""
        with self._lock:
            died = ""
            for _ in range(2):
                child = self._running()
                answer = _exchange(child, data, request)
                if answer is not None:
                    return answer
                self._child = None
                code = _discard(child)
                if code == -signal.SIGALRM:
                    raise FrameError(
                        "too_slow",
                        f"decoding takes longer than {self.limits.seconds:g} s; re-encode the picture, or raise the "
                        "limit (--decode-timeout).",
                    )
                died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise FrameError("not_an_image", f"its decoder crashed ({died}); re-encode the picture.")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid():
            self._child = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), json.dumps(vars(self.limits))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libtiff and others write what they think of a file
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            self._owner = os.getpid()
        return self._child


@functools.lru_cache(maxsize=4)
def shared_decoder(limits: PictureLimits = DEFAULT_LIMITS) -> PictureDecoder:
    """The decoder of this process for ``limits``."""
    return PictureDecoder(limits)


def _exchange(child: subprocess.Popen[bytes], data: bytes, request: dict[str, Any]) -> Pixels | None:
    """The array that answers ``request``; None if the child died. Raises FrameError."""
    to, back = cast(BinaryIO, child.stdin), cast(BinaryIO, child.stdout)
    try:
        to.write(json.dumps(request | {"bytes": len(data)}).encode() + b"\n")
        to.write(data)
        to.flush()
    except BrokenPipeError:
        return None
    head = back.readline()
    if not head.endswith(b"\n"):
        return None
    answer = json.loads(head)
    if "kind" in answer:
        raise FrameError(answer["kind"], answer["message"])
    raw = back.read(answer["bytes"])
    return np.frombuffer(raw, answer["dtype"]).reshape(answer["shape"]) if len(raw) == answer["bytes"] else None


def _discard(child: subprocess.Popen[bytes]) -> int:
    """Close the pipes of a child that is dead or dying; its exit code."""
    with contextlib.suppress(BrokenPipeError):
        cast(BinaryIO, child.stdin).close()
    cast(BinaryIO, child.stdout).close()
    return child.wait()


def serve(limits: dict[str, Any]) -> None:
    """The child: requests from standard input, answers to standard output, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    kept = PictureLimits(**limits)
    _prepare(kept)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        signal.setitimer(signal.ITIMER_REAL, kept.seconds)
        try:
            array = np.ascontiguousarray(_answer(request, data, kept))
            head = {"shape": array.shape, "dtype": array.dtype.str, "bytes": array.nbytes}
            body = array.tobytes()
        except FrameError as error:
            head, body = {"kind": error.kind, "message": error.message}, b""
        except MemoryError:
            head, body = {"kind": "too_large", "message": "decoding takes more memory than allowed."}, b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(head).encode() + b"\n" + body)
        answers.flush()


def _answer(request: dict[str, Any], data: bytes, limits: PictureLimits) -> np.ndarray:
    fast = request.get("resolution") if request.get("decode") == "fast" else request.get("side")
    pixels = decode_jpeg(data, fast, limits)
    pixels = decode_with_pillow(data, limits) if pixels is None else pixels
    if request["do"] == "square":
        return resize(pixels, request["resolution"])
    if request["do"] == "fit":
        return fit_within(pixels, request["side"])
    return np.array([pixels.shape[1], pixels.shape[0]])


def _prepare(limits: PictureLimits) -> None:
    """Import the decoders, and only then bound the memory."""
    signal.setitimer(signal.ITIMER_REAL, _START_SECONDS)
    installed_formats()
    if avif := sys.modules.get("PIL.AvifImagePlugin"):
        # The stacks of a thread per core would count as the picture's memory.
        avif.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:  # its sixth figure: pages of data and stack
            held = int(file.read().split()[5]) * resource.getpagesize()
        most = held + limits.max_held_bytes + limits.max_bytes + _SLACK_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
