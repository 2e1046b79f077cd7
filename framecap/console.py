"""What the commands print must come out on every terminal: Russian text on an ASCII one, names that are not UTF-8."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Let standard output and error write ``\\u043a`` or ``\\udcea`` for what their encoding has no word for, instead
    of ending in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
