"""The drawn world, its Russian descriptions, and the mini captioner trained on them.

Importing this package pulls in neither torch nor Pillow; the modules below it do.
"""

from __future__ import annotations

from pathlib import Path


def bundled_captioner() -> Path:
    """The directory of the captioner that ships with framecap."""
    return Path(__file__).parent / "mini"
