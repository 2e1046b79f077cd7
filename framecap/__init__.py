"""framecap: Russian descriptions for every key frame of a video archive.

Names are resolved on first use, so that ``import framecap.model.x`` on a bare PyTorch machine pulls in
neither Ray nor pyarrow nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framecap.model.captioner import Caption, Captioner, describe_image
    from framecap.model.generate import DecodeOptions
    from framecap.notebook import read_captions, show

__version__ = "0.1.0"

_HOME = {
    "Caption": "framecap.model.captioner",
    "Captioner": "framecap.model.captioner",
    "DecodeOptions": "framecap.model.generate",
    "describe_image": "framecap.model.captioner",
    "read_captions": "framecap.notebook",
    "show": "framecap.notebook",
}
__all__ = ["Caption", "Captioner", "DecodeOptions", "describe_image", "read_captions", "show"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'framecap' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
