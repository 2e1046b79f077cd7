"""`docs/reference.md`: every setting, command and column, written out from the code itself.

``python -m framecap.reference`` prints the page; a test fails when the committed one is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa
from pydantic.fields import FieldInfo

from framecap.cli import command_parser
from framecap.pipeline.settings import CaptionSettings
from framecap.schema import CANDIDATES_FIELD, CAPTION_FIELDS, COLUMN_MEANINGS, EMBEDDING_COLUMN
from framecap.settings import JobSettings, flag
from framecap.training.settings import EvaluateSettings, TrainSettings

JOBS: dict[str, type[JobSettings]] = {
    "framecap run` and `jobs/caption_frames.py": CaptionSettings,
    "jobs/train_captioner.py": TrainSettings,
    "jobs/evaluate_captions.py": EvaluateSettings,
}
# Where Arrow's own name is not the one that users know.
_TYPES = {pa.float32(): "float32", CANDIDATES_FIELD.type: "list<string>"}
_HEAD = """# Reference: settings, commands, columns

<!-- Generated: python -m framecap.reference > docs/reference.md -->

A setting of a job is a flag (`--num-beams 5`), an environment variable (`FRAMECAP_NUM_BEAMS=5`) or a line of the YAML
file that `--config` names (`num_beams: 5`). A flag beats the environment, the environment beats the file.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD, _columns()]
    parts += [_job(script, settings) for script, settings in JOBS.items()]
    parts += [_command(name, parser) for name, parser in _commands()]
    return "\n".join(parts)


def _columns() -> str:
    types = {field.name: _TYPES.get(field.type, str(field.type)) for field in (*CAPTION_FIELDS, CANDIDATES_FIELD)}
    types[EMBEDDING_COLUMN] = "fixed_size_list<float16>"
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


if __name__ == "__main__":
    sys.stdout.write(page())
