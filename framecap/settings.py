"""Settings of the jobs: one class per job, filled alike from flags, ``FRAMECAP_*`` and a YAML file.

Precedence: flag, then environment, then ``--config`` file, then default. A key that no setting has is
refused with the nearest one that exists. Knows nothing of what the jobs do with the values.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
from argparse import ArgumentParser, _ArgumentGroup
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as PydanticSettingsError

from framecap.errors import SettingsError

log = logging.getLogger(__name__)

ENV_PREFIX = "FRAMECAP_"
_FILE_VALUES: ContextVar[dict[str, Any] | None] = ContextVar("framecap_config_file", default=None)


def _as_list(value: object) -> object:
    """``a,b`` and ``[a, b]`` both mean two strings; commas inside stop strings need the second form."""
    if isinstance(value, str):
        parsed = yaml.safe_load(value) if value.lstrip().startswith("[") else None
        return parsed if isinstance(parsed, list) else [part for part in value.split(",") if part]
    return value


def _as_texts(value: object) -> object:
    """One text, or ``[a, b]`` for several; commas are part of a text."""
    if isinstance(value, str):
        parsed = yaml.safe_load(value) if value.lstrip().startswith("[") else None
        return parsed if isinstance(parsed, list) else [value]
    return value


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _as_seconds(value: object) -> object:
    """``90``, ``"90s"``, ``"15m"``, ``"7.5h"`` → seconds."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([\d.]+)\s*([smhd]?)\s*", value)):
        return float(match[1]) * _UNITS[match[2]]
    if isinstance(value, str):
        raise ValueError("not a duration; use seconds (90), or 30m, 7.5h, 2d")
    return value


# What `--help` calls a value, by the type that pydantic-settings would print.
_WORDS = {"str": "TEXT", "int": "N", "float": "X", "Path": "FILE", "tuple[str,...]": "A,B", "dict[str,Any]": "JSON"}

StringList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_as_list)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_as_texts)]
Seconds = Annotated[float, BeforeValidator(_as_seconds)]


class JobSettings(BaseSettings):
    """Base of every job's settings; subclasses only declare fields with a description and a default."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_enforce_required=False,
        env_ignore_empty=True,
        env_parse_none_str="none",
        protected_namespaces=(),
    )
    # Variables that the library itself reads; no job has a setting of that name.
    environment_only: ClassVar[frozenset[str]] = frozenset({"FRAMECAP_CACHE", "FRAMECAP_CAPTIONER"})
    # Settings of type ``Texts``, whose flags may be repeated.
    repeatable: ClassVar[frozenset[str]] = frozenset()
    # The first setting of each group of ``--help``: its heading.
    headings: ClassVar[dict[str, str]] = {}

    config: Path | None = Field(None, description="YAML file with any of these settings, by name")
    storage_options: dict[str, Any] = Field(
        default={},
        description='fsspec options as JSON, by scheme: {"s3": {"endpoint_url": "http://…"}}; flat for one store',
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Python arguments, environment, YAML file; flags are put in front by pydantic-settings."""
        file_values = InitSettingsSource(settings_cls, init_kwargs=_FILE_VALUES.get() or {})
        return init_settings, env_settings, file_values

    @classmethod
    def from_command_line(cls, argv: list[str] | None = None, prog: str | None = None) -> Self:
        """Settings from flags (default: ``sys.argv[1:]``), environment and the ``--config`` file.

        ``prog``: the command's name in ``--help`` (default: the script's).

        Raises ``SettingsError`` with one line for an unknown key, a missing or an impossible value.
        ``--help`` prints every setting with its default and leaves with exit code 0.
        """
        arguments = _joined(cls, list(sys.argv[1:] if argv is None else argv))
        _check_flags(cls, arguments)
        _check_environment(cls)
        token = _FILE_VALUES.set(_read_config(cls, arguments))
        try:
            flags: CliSettingsSource[ArgumentParser] = CliSettingsSource(
                cls, root_parser=_parser(cls, prog), add_argument_method=_argument_adder(cls)
            )
            return CliApp.run(cls, cli_args=arguments, cli_settings_source=flags, cli_exit_on_error=False)
        except ValidationError as error:
            raise SettingsError(_one_line(cls, error)) from None
        except PydanticSettingsError as error:
            raise SettingsError(" ".join(str(error).split())) from None
        finally:
            _FILE_VALUES.reset(token)


class _Parser(ArgumentParser):
    """argparse, but a mistake is a ``SettingsError``."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see --help")


def _parser(cls: type[JobSettings], prog: str | None) -> ArgumentParser:
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    needed = " ".join(f"{flag(name)} {name.removesuffix('_uri').upper()}" for name in required)
    return _Parser(prog, f"%(prog)s {needed} [SETTING …]", cls.__doc__, allow_abbrev=False)


def _argument_adder(cls: type[JobSettings]) -> Callable[..., None]:
    """``ArgumentParser.add_argument`` that puts each flag under its heading, with a word for the value instead of
    its Python type."""
    headings: dict[str, str | None] = {}
    heading = None
    for name in cls.model_fields:
        heading = cls.headings.get(name, heading)
        headings[flag(name)] = heading
    groups: dict[str, _ArgumentGroup] = {}

    def add(parser: ArgumentParser, *names: str, **keywords: Any) -> None:
        if keywords.get("metavar") in _WORDS:
            keywords["metavar"] = _WORDS[keywords["metavar"]]
        own = headings[names[0]]
        if own is not None and own not in groups:
            groups[own] = parser.add_argument_group(own)
        target = parser if own is None else groups[own]
        target.add_argument(*names, **keywords)

    return add


def flag(name: str) -> str:
    """``num_beams`` → ``--num-beams``."""
    return "--" + name.replace("_", "-")


def _nearest(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known ones: {', '.join(sorted(known))}"


def _check_flags(cls: type[JobSettings], arguments: list[str]) -> None:
    positive = [flag(name) for name in cls.model_fields]
    switches = [name for name, field in cls.model_fields.items() if field.annotation is bool]
    negative = ["--no-" + name.replace("_", "-") for name in switches]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and len(name) > 2 and name not in {*positive, *negative, "--help"}:
            raise SettingsError(f"unknown flag {name}; {_nearest(name, positive)}")


def _joined(cls: type[JobSettings], arguments: list[str]) -> list[str]:
    """The arguments with all values of a repeatable flag in one, as a JSON list.

    pydantic-settings would join them by commas, which texts may hold.
    """
    values: dict[str, list[str]] = {flag(name): [] for name in cls.repeatable}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in values:
            others.append(argument)
        elif equals:
            values[name].append(value)
        elif (following := next(rest, None)) is not None:
            values[name].append(following)
        else:
            raise SettingsError(f"{name} needs a value")
    return others + [f"{name}={json.dumps(texts, ensure_ascii=False)}" for name, texts in values.items() if texts]


def _check_environment(cls: type[JobSettings]) -> None:
    """Other jobs share the prefix, so only a variable that looks like a slip of the pen is refused."""
    known = [ENV_PREFIX + name.upper() for name in cls.model_fields]
    for variable in os.environ:
        name = variable.upper()
        if not name.startswith(ENV_PREFIX) or name in known or name in cls.environment_only:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        if close:
            raise SettingsError(f"unknown environment variable {variable}; did you mean {close[0]}?")
        log.warning("environment variable %s is no setting of this job and is ignored", variable)


def _config_path(arguments: list[str]) -> str | None:
    path = os.environ.get(ENV_PREFIX + "CONFIG") or None
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            path = arguments[position + 1]
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
    return path


def _read_config(cls: type[JobSettings], arguments: list[str]) -> dict[str, Any]:
    path = _config_path(arguments)
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"--config {path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path} must map setting names to values, not {type(values).__name__}")
    known = [name for name in cls.model_fields if name != "config"]
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise SettingsError(f"unknown key {key!r} in {path}; {_nearest(name, known)}")
        settings[name] = value
    return settings


def _one_line(cls: type[JobSettings], error: ValidationError) -> str:
    """All mistakes in one line, each with the flag it belongs to."""
    parts = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "missing":
            parts.append(f"{flag(name)} is required")
        elif problem["type"] == "extra_forbidden":
            parts.append(f"unknown setting {name!r}; {_nearest(name, list(cls.model_fields))}")
        else:
            message = str(problem["msg"]).removeprefix("Value error, ")
            given = "" if name == "storage_options" else f" {problem['input']!r}"  # those may hold secrets
            parts.append(f"{flag(name)}{given}: {message}" if name else message)
    return "; ".join(parts)
