"""JSON files of a checkpoint. Imports no torch: a driver reads configs and loads no weights."""

from __future__ import annotations

import json
from pathlib import Path

from framecap.errors import MissingFileError, WeightsError


def read_json(path: str | Path) -> dict[str, object]:
    """Read a JSON object; MissingFileError when it is not there, WeightsError when it is not JSON."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; a checkpoint must have it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__} where a JSON object is needed.")
    return content
