"""Checkpoint files → named tensors, and named tensors → a module, strictly.

Knows nothing of what the tensors are for. Pickles are read with ``weights_only=True``, or by ``plain_pickle``, which is
as strict, so that a checkpoint can hold weights and never code.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from framecap.errors import MissingFileError, StateDictError, UnsafePickleError, WeightsError
from framecap.model.json_files import read_json
from framecap.model.plain_pickle import needs_plain_reader, read_plainly

SAFETENSORS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
_INDEX_NAMES = (f"{SAFETENSORS_NAME}.index.json", f"{PICKLE_NAME}.index.json")
_SHARD_ENDINGS = (".safetensors", ".bin")
# Keys that training frameworks put a state dict under (Lightning, fairseq, DeepSpeed), beside optimiser and epoch.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# What DistributedDataParallel, torch.compile and a Lightning module named "model" put before every name.
_NAME_PREFIXES = ("module.", "_orig_mod.", "model.")
# What torch's weights-only unpickler says of a pickle that names a class or function it does not trust.
_UNSAFE_MARKS = (
    "Unsupported global",
    "unsupported GLOBAL",
    "Trying to call reduce",
    "Can only create new object",
    "Can only build Tensor",
)


def find_weights(directory: str | Path) -> list[Path]:
    """Return the weight files of a checkpoint directory, safetensors before pickle, shards in name order.

    Raises MissingFileError when the directory holds neither ``model.safetensors`` nor ``pytorch_model.bin``
    nor the ``.index.json`` of a sharded one (the layouts transformers writes).
    """
    directory = Path(directory)
    if not directory.exists():
        raise MissingFileError(f"{directory} does not exist; check the path.")
    if not directory.is_dir():
        raise MissingFileError(f"{directory} is not a directory; give the folder that holds the checkpoint.")
    for name in (SAFETENSORS_NAME, PICKLE_NAME):
        if (directory / name).is_file():
            return [directory / name]
    for name in _INDEX_NAMES:
        if (directory / name).is_file():
            return [directory / shard for shard in _indexed_shards(directory / name)]
    raise MissingFileError(
        f"{directory} holds neither {SAFETENSORS_NAME} nor {PICKLE_NAME}; put the checkpoint's weights there."
    )


def _indexed_shards(index: Path) -> list[str]:
    """The weight files that an index names, which must lie beside it, in name order."""
    shards = read_json(index).get("weight_map", {})
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{index} names no shards in 'weight_map'; fetch it again.")
    for shard in shards.values():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(_SHARD_ENDINGS):
            raise WeightsError(
                f"{index} names {shard!r} as a shard, which is no {' or '.join(_SHARD_ENDINGS)} file beside it; "
                "fetch it again."
            )
    return sorted(set(shards.values()))


def index_of(weights: list[Path]) -> str | None:
    """Name of the ``.index.json`` that names the shards ``weights`` (of ``find_weights``); None for one whole file."""
    if weights[0].name in (SAFETENSORS_NAME, PICKLE_NAME):
        return None
    return next((name for name in _INDEX_NAMES if weights[0].with_name(name).is_file()), None)


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a weight file, or all weight files of a checkpoint directory, into CPU tensors by name.

    ``path`` is a directory (see ``find_weights``), a ``.safetensors`` file, a ``torch.save`` file or a TorchScript
    archive, whose code is not run. A dict wrapped as ``{"state_dict": …}`` or ``{"model": …}`` is unwrapped, and
    prefixes that wrappers put before every name (``module.``, ``model.``, ``_orig_mod.``) are taken off. Raises
    MissingFileError, UnsafePickleError for a pickle that wants more than tensors, WeightsError for anything else that
    cannot be read as weights.
    """
    path = Path(path)
    files = find_weights(path) if path.is_dir() else [path]
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.is_file():
            raise MissingFileError(f"{file} does not exist; put the checkpoint's weights there.")
        if file.stat().st_size == 0:
            raise WeightsError(f"{file} is empty; fetch it again.")
        state.update(_read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file))
    return _without_wrapper_prefixes(state)


def write_state_dict(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write ``state`` as safetensors (contiguous CPU copies, format marked "pt" as transformers expects).

    Put in place by a rename: tensors read from the old file of that name still map it.
    """
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(unfinished), metadata={"format": "pt"})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_layout(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Raise StateDictError naming every key of ``state`` that ``expected`` lacks, has alone or has shaped
    differently. ``source`` is what the message calls the checkpoint."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    mis_shaped = [
        f"{name} {list(state[name].shape)} (should be {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or mis_shaped:
        raise StateDictError(str(source), missing, unexpected, mis_shaped)


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Copy ``state`` into ``module`` (in the module's dtype and device); every key must fit.

    Raises StateDictError naming missing, unexpected and mis-shaped keys; ``source`` goes into its message.
    """
    check_layout(module.state_dict(), state, source)
    module.load_state_dict(dict(state), strict=True)


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read as safetensors ({error}); fetch it again.") from error


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    if needs_plain_reader(file):
        return _named_tensors(read_plainly(file), file)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(mark in str(error) for mark in _UNSAFE_MARKS):
            raise UnsafePickleError(
                f"{file} is a pickle that wants to run code ({_first_line(error)}); refused. "
                "Save it again as tensors only, best as model.safetensors."
            ) from error
        raise WeightsError(f"{file} cannot be read ({_first_line(error)}); fetch it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        # What torch's readers raise on damaged archives and on bytes that are no pickle at all.
        raise WeightsError(f"{file} cannot be read ({_first_line(error)}); fetch it again.") from error
    return _named_tensors(content, file)


def _named_tensors(content: object, file: Path) -> dict[str, torch.Tensor]:
    """The state dict in ``content``, out of the dicts that training frameworks wrap it in."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file} holds a {type(content).__name__} where a dict of tensors is needed.")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        names = ", ".join(strangers[:8])
        raise WeightsError(f"{file} holds entries that are not tensors: {names}. Save the model's state_dict() alone.")
    return {str(name): tensor for name, tensor in content.items()}


def _without_wrapper_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` without the prefixes that every one of its names has; see ``_NAME_PREFIXES``."""
    state = {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}
    while prefix := next((p for p in _NAME_PREFIXES if state and all(name.startswith(p) for name in state)), None):
        bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if any(name[:1].isdigit() for name in bare):  # an nn.Sequential called model: the names of a bridge, say
            break
        state = bare
    return state


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if any(mark in line for mark in _UNSAFE_MARKS)]
    line = (telling or lines or [type(error).__name__])[0]
    return line.split(" was not an allowed")[0].split(". ")[0].strip()[:200]
