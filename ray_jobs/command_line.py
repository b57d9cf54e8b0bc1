"""From flags and a YAML file to a job's typed configuration, and from its result to an exit code.

Every field of a configuration is a flag; every flag can stand in the YAML file given as ``--config``, and a flag on the
command line wins. A flag that neither gives may stand in the installation's settings (``--registered-model``). A bad
value ends with exit code 2 and one line that names it; an MLflow store that is down or locked with exit code 1 and one
line that says what finishes the job. The last line of standard output is one JSON object: the job's summary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.run_log import begin_run, in_json, json_line
from geneformer_ray.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["JobConfig", "build", "in_submitted_copy", "main", "parse", "place", "store_directory"]

ConfigT = TypeVar("ConfigT", bound="JobConfig")


class JobConfig(BaseModel):
    """The flags that every job has."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Which of its fields the installation's settings may fill.
    of_settings: ClassVar[frozenset[str]] = frozenset(Settings.model_fields) - {"api_keys"}

    overwrite: bool = Field(False, description="replace what lies in the output")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the whole usage in front of it.
        self.exit(2, f"{self.prog}: {message}\n")


def _add_flags(parser: argparse.ArgumentParser, kind: type[JobConfig]) -> None:
    for name, field in kind.model_fields.items():
        text = field.description or ""
        if field.is_required():
            text += " (required)"
        elif isinstance(field.default, bool):
            text += f" (default: {str(field.default).lower()})"
        elif field.default not in (None, "", (), {}):
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            text += f" (default: {default})"
        extra: dict[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if field.annotation is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif extra.get("several"):
            options |= {"nargs": "+", "metavar": extra.get("metavar")}
        elif get_origin(field.annotation) is dict:
            options |= {"action": "append", "metavar": extra.get("metavar")}
        else:
            options |= {"metavar": extra.get("metavar", name.upper())}
        parser.add_argument(_flag(name), **options)


def _from_text(kind: type[JobConfig], name: str, value: Any) -> Any:
    """Split what a flag holds into what the field takes: commas for lists, COLUMN=A,B for mappings."""
    annotation = kind.model_fields[name].annotation
    if get_origin(annotation) is Literal and isinstance(value, str):
        # pydantic takes a Literal's values as they are: the text -1 is not the number.
        return {str(choice): choice for choice in get_args(annotation)}.get(value, value)
    if get_origin(annotation) is tuple:
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",")]
            extra = kind.model_fields[name].json_schema_extra
            return parts if isinstance(extra, dict) and extra.get("keeps_empty") else [part for part in parts if part]
        return [value] if isinstance(value, int | float) else value  # YAML: seeds: 0
    if annotation is str and isinstance(value, list):
        return ",".join(map(str, value))  # YAML: genes: [A, B]
    if get_origin(annotation) is dict and get_args(annotation)[1] is float:
        return value if isinstance(value, dict) else _numbers(name, value)
    if get_origin(annotation) is dict and isinstance(value, dict):
        return {key: [str(one)] if isinstance(one, str | int) else one for key, one in value.items()}
    if get_origin(annotation) is dict and not isinstance(value, dict):
        pairs: dict[str, list[str]] = {}
        for text in value if isinstance(value, list) else [value]:
            key, equals, values = str(text).partition("=")
            if not equals or not key or not values:
                raise InputError(_flag(name), text, "COLUMN=A,B")
            pairs[key] = [*pairs.get(key, []), *values.split(",")]
        return pairs
    return value


def _numbers(name: str, value: Any) -> dict[str, str]:
    """Split NAME=NUMBER,NAME=NUMBER; pydantic reads the numbers."""
    pairs: dict[str, str] = {}
    for text in ",".join(map(str, value if isinstance(value, list) else [value])).split(","):
        key, equals, number = text.rpartition("=")
        if not equals or not key or not number or key in pairs:
            raise InputError(_flag(name), text, "NAME=NUMBER,NAME=NUMBER, each name once")
        pairs[key] = number
    return pairs


def parse(
    kind: type[ConfigT], arguments: Sequence[str] | None = None, *, description: str = "", prog: str | None = None
) -> ConfigT:
    """Read a job's configuration from the command line and its YAML file.

    Raises
    ------
    InputError
        With the flag, what it got and what it takes.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of flags; flags given here win")
    _add_flags(parser, kind)
    given = vars(parser.parse_args(arguments))
    file = given.pop("config", None)
    values = _read_yaml(file, kind) if file else {}
    values |= given
    shared = Settings.read().model_dump(exclude_none=True, include=set(kind.of_settings))
    values = {name: value for name, value in shared.items() if name in kind.model_fields} | values
    values = {name: _from_text(kind, name, value) for name, value in values.items()}
    return build(kind, values)


def build(kind: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Check values and make the configuration."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = _flag(str(first["loc"][0])) if first["loc"] else "flags"
        if first["type"] == "missing":
            raise InputError(field, "nothing", "a value: it is required") from error
        message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
        raise InputError(field, repr(first["input"]), message) from error


def _read_yaml(file: str, kind: type[JobConfig]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(storage.read_bytes(file))
    except FileNotFoundError as error:
        raise InputError("--config", file, "a file that exists") from error
    except (OSError, yaml.YAMLError) as error:
        raise InputError("--config", file, f"a readable YAML file ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError("--config", file, "a YAML mapping of flags")
    values = {str(key).lstrip("-").replace("-", "_"): value for key, value in content.items()}
    unknown = [key for key in values if key not in kind.model_fields]
    if unknown:
        raise InputError("--config", f"{file} with {unknown[0]}", f"flags of this job: {', '.join(kind.model_fields)}")
    return values


def main(
    kind: type[ConfigT],
    run: Callable[[ConfigT], dict[str, Any]],
    description: str,
    *,
    exit_code: Callable[[dict[str, Any]], int] | None = None,
) -> NoReturn:
    """Run a job from the command line: parse, run, print one JSON summary line."""
    prog = f"python -m ray_jobs.{Path(sys.argv[0]).stem}"
    begun = begin_run(Path(sys.argv[0]).stem)
    try:
        begun = begin_run(begun.job, Settings.read().log_format)
        config = parse(kind, description=description.strip(), prog=prog)
        # Standard output is the summary's alone, whatever libraries print.
        with contextlib.redirect_stdout(sys.stderr):
            summary = run(config)
    except InputError as error:
        _end(f"{prog}: {error}", 2)
    except RegistryUnavailable as error:
        # Nothing is wrong with the input, and the message says what finishes the job; no summary, for it is not done.
        _end(f"{prog}: {error}", 1)
    except OSError as error:
        _end(f"{prog}: {type(error).__name__}: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        _end(f"{prog}: stopped; the same command goes on where it can", 130)
    print(json.dumps({**summary, "run": begun.id}), flush=True)
    # A summary may tell of faults: what was asked for is done all the same.
    sys.exit(exit_code(summary) if exit_code else 0)


def _end(text: str, code: int) -> NoReturn:
    print(json_line(text, "error", exit_code=code) if in_json() else text, file=sys.stderr)
    sys.exit(code)


def place(path: str, field: str) -> str:
    """Make a path absolute: below the storage of the settings, else below the working directory.

    Without a storage, a relative path is refused in the throw-away copy that ``ray job submit`` works in.
    """
    if (settings := Settings.read()).storage is not None:
        if os.path.normpath(path).split("/")[0] == "..":
            raise InputError(field, path, f"a path below GENEFORMER_STORAGE, {settings.storage}")
        path = settings.below_storage(path)
    if not storage.is_uri(path) and not os.path.isabs(os.path.expanduser(path)) and in_submitted_copy():
        takes = "an absolute path, a URI, or GENEFORMER_STORAGE: a submitted job works in a copy that Ray throws away"
        raise InputError(field, f"the relative path {path}", takes)
    return storage.absolute(path)


def in_submitted_copy() -> bool:
    """Whether the working directory is a package that ``ray job submit --working-dir`` unpacked."""
    return "runtime_resources" in Path.cwd().parts


def store_directory() -> str:
    """Say where the default MLflow store goes: the working directory, unless that is thrown away."""
    uri = Settings.read().tracking_uri or ""
    absolute = uri.startswith(("/", "sqlite:////")) or ("://" in uri and not uri.startswith("sqlite:"))
    if not absolute and in_submitted_copy():
        got = f"{uri or 'nothing'}, and a store in the working directory of a submitted job would be thrown away"
        raise InputError("MLFLOW_TRACKING_URI", got, "an MLflow server or sqlite:////absolute/path")
    return str(Path.cwd() / "mlflow")
