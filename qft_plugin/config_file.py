"""Settings as plain data, and in files: TOML and JSON, what is at its default left out."""

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

from qft_plugin.config import QFTConfig
from qft_plugin.errors import ConfigError
from qft_plugin.files import write_whole
from qft_plugin.packages import missing

if sys.version_info >= (3, 11):
    import tomllib

SUFFIXES: Final = (".toml", ".json")

NONE: Final = "none"
"""Where `None` is not the default it must be written, and TOML has no null: `finetune = "none"`."""


ConfigT = TypeVar("ConfigT")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return settings as plain data that JSON and TOML can hold: what is at its default is left out.

    Args:
        config: a `QFTConfig`, or a part of one.

    Raises:
        ConfigError: a setting is a function, which no file can hold.
    """
    data: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == _default(field):
            continue
        name = f"{type(config).__name__}.{field.name}"
        data[field.name] = config_to_dict(value) if dataclasses.is_dataclass(value) else _plain(value, name)
    return data


def config_from_dict(data: Mapping[str, Any]) -> QFTConfig:
    """Make settings from plain data, as `config_to_dict` returns; what is left out is at its default.

    Lists become tuples. `None`, and the word `"none"` where `None` is allowed and not the default, mean `None`.

    Args:
        data: settings by name; those of `hardware`, `finetune` and `finetune.train` are mappings themselves.

    Raises:
        ConfigError: a name is unknown (it says the closest known one), or a value is of the wrong type or out of range.
    """
    return _made(QFTConfig, data)


def load_config(path: str | os.PathLike[str]) -> QFTConfig:
    """Read settings from a file.

    Args:
        path: a `.toml` or `.json` file.

    Raises:
        ConfigError: the file cannot be read, or holds something else; the message begins with its name.
    """
    source = _checked(path)
    if not source.is_file():
        raise ConfigError(f"{source}: should be a file of settings. Found none. Look at its name and its folder.")
    try:
        text = source.read_text(encoding="utf-8")
        data = json.loads(text) if source.suffix == ".json" else _from_toml(text)
    except (OSError, ValueError) as error:  # what both parsers raise are ValueErrors
        raise ConfigError(
            f"{source}: should be a {source.suffix[1:].upper()} file. Found {type(error).__name__}: {error}. "
            "Look at the place that it names."
        ) from error
    try:
        return config_from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def save_config(config: QFTConfig, path: str | os.PathLike[str]) -> None:
    """Write settings to a file that `load_config` reads to an equal object; the file appears whole or not at all.

    Args:
        config: the settings. Lists in them are read back as tuples.
        path: a `.toml` or `.json` file; an existing one is replaced.

    Raises:
        ConfigError: the file cannot be written, or a setting is a function, which no file can hold.
    """
    target = _checked(path)
    data = config_to_dict(config)
    text = json.dumps(data, indent=2) + "\n" if target.suffix == ".json" else _to_toml(data)
    try:
        write_whole(target, text)
    except OSError as error:
        raise ConfigError(
            f"{target}: should be a file in a folder that can be written to. Found {type(error).__name__}: "
            f"{error}. Make the folder, or change the name."
        ) from error


def _made(kind: type[ConfigT], data: Any) -> ConfigT:
    name = kind.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name} should be a table of settings by name. Found {data!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [str(key) for key in data if key not in fields]
    if unknown:
        known = [f"{key!r}{_closest(key, fields)}" for key in unknown]
        raise ConfigError(f"{name} should have known settings only. Found {', '.join(known)}. Correct or remove them.")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        allowed = get_args(hints[key]) or (hints[key],)
        nested: Any = next((t for t in allowed if dataclasses.is_dataclass(t)), None)
        written_none = value == NONE and type(None) in allowed and _default(fields[key]) is not None
        if value is None or written_none:
            values[key] = None
        elif nested is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}.{key} should be a table of settings by name. Found {value!r}.")
            values[key] = _made(nested, value)
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _closest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known are {', '.join(known)})"


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any, name: str) -> Any:
    """Return a value in types that both formats have."""
    if value is None:
        return NONE
    if callable(value):
        raise ConfigError(
            f"{name} should be None to be written to a file, which holds no functions. Found {value!r}. Leave it out, "
            "and set it where the file is read: dataclasses.replace(config, ...)."
        )
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, name) for part in value]
    return value


def _checked(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if found.suffix not in SUFFIXES:
        raise ConfigError(f"{found}: a file of settings should end with .toml or .json. Found {found.suffix!r}.")
    return found


def _from_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        return tomllib.loads(text)
    try:
        import tomli
    except ImportError:
        raise missing("To read TOML on Python 3.10, tomli", extra="cli") from None
    data: dict[str, Any] = tomli.loads(text)
    return data


def _to_toml(data: dict[str, Any]) -> str:
    try:
        import tomli_w
    except ImportError:
        raise missing("To write TOML and not JSON, tomli-w", extra="cli") from None
    text: str = tomli_w.dumps(data)
    return text
