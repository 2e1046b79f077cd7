"""Pages of docs/ that are written out from the code: every setting, command and column, and every file.

``python -m framecap.reference`` writes `docs/reference.md` and `docs/files.md`; a test fails when they are out of date.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pydantic.fields import FieldInfo

from framecap.cli import command_parser
from framecap.pipeline.settings import CaptionSettings
from framecap.schema import (
    CANDIDATES_FIELD,
    CAPTION_EMBEDDING_COLUMN,
    CAPTION_FIELDS,
    COLUMN_MEANINGS,
    EMBEDDING_COLUMN,
    QUERY_COLUMN,
)
from framecap.settings import JobSettings, flag
from framecap.training.settings import EvaluateSettings, TrainSettings

ROOT = Path(__file__).parents[1]
JOBS: dict[str, type[JobSettings]] = {
    "framecap run` and `jobs/caption_frames.py": CaptionSettings,
    "jobs/train_captioner.py": TrainSettings,
    "jobs/evaluate_captions.py": EvaluateSettings,
}
# Where Arrow's own name is not the one that users know.
_TYPES = {pa.float32(): "float32", CANDIDATES_FIELD.type: "list<string>"}
_HEAD = """# Reference: settings, commands, columns

<!-- Generated: python -m framecap.reference -->

A setting of a job is a flag (`--num-beams 5`), an environment variable (`FRAMECAP_NUM_BEAMS=5`) or a line of the YAML
file that `--config` names (`num_beams: 5`). A flag beats the environment, the environment beats the file.
"""


_FILES_HEAD = """# Every file, with what it is for

<!-- Generated from the first lines of the modules: python -m framecap.reference -->

Imports go downward only; `tests/test_imports.py` has the layers. [architecture.md](architecture.md) says how the parts
work together.
"""


def files_page(root: Path = ROOT) -> str:
    """A table for each folder of the code: file, and the first sentence of its docstring."""
    folders: dict[str, list[tuple[str, ...]]] = {}
    for path in sorted([*root.glob("framecap/**/*.py"), *root.glob("jobs/*.py")]):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        phrase = " ".join(docstring.partition("\n\n")[0].split())
        folders.setdefault(path.parent.relative_to(root).as_posix(), []).append((f"`{path.name}`", phrase))
    tables = [f"## {folder}/\n\n" + _table(("file", "what it is for"), rows) for folder, rows in folders.items()]
    return "\n".join([_FILES_HEAD, *tables])


def reference_page() -> str:
    """The page of settings, commands and columns as Markdown."""
    parts = [_HEAD, _columns()]
    parts += [_job(script, settings) for script, settings in JOBS.items()]
    parts += [_command(name, parser) for name, parser in _commands()]
    return "\n".join(parts)


def _columns() -> str:
    types = {field.name: _TYPES.get(field.type, str(field.type)) for field in (*CAPTION_FIELDS, CANDIDATES_FIELD)}
    types |= {EMBEDDING_COLUMN: "fixed_size_list<float16>", CAPTION_EMBEDDING_COLUMN: "fixed_size_list<float16>"}
    types[QUERY_COLUMN] = "list<float32>"
    rows = [(f"`{name}`", kind, COLUMN_MEANINGS[name]) for name, kind in types.items()]
    return "## Columns that captioning adds\n\n" + _table(("column", "type", "meaning"), rows)


def _job(script: str, settings: type[JobSettings]) -> str:
    rows = [
        (f"`{flag(name)}`", _default(field), field.description or "") for name, field in settings.model_fields.items()
    ]
    return f"## `{script}`\n\n" + _table(("flag", "default", "meaning"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is True or value is False:
        return "on" if value else "off"
    if value in (None, (), {}, ""):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in command_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            # The arguments of `run` are the settings of the job.
            yield from ((name, parser) for name, parser in action.choices.items() if name != "run")


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        rows.append((names, action.help or ""))
    text = f"## `framecap {name}`\n\n{parser.description}\n\n" + _table(("argument", "meaning"), rows)
    return text + (f"\n{parser.epilog}\n" if parser.epilog else "")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


PAGES: dict[str, Callable[[], str]] = {"docs/reference.md": reference_page, "docs/files.md": files_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
