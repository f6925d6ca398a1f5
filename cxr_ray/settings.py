"""Settings: one YAML a command, overridden by flags, checked by a pydantic model, printed in full at the start."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cxr_ray.errors import UsageError


class Settings(BaseModel):
    """Base of every command's settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsType = TypeVar("SettingsType", bound=Settings)
_checking = ContextVar("_checking", default=False)


class SettingsChecked(Exception):
    """Settings were found valid by a command that goes no further."""


@contextmanager
def checking_only() -> Iterator[None]:
    """Have `load_settings` raise `SettingsChecked` in place of returning, so that the command that called it ends there."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def load_settings(model: type[SettingsType], config: Path | None, flags: Mapping[str, object]) -> SettingsType:
    """The settings of a command: defaults, then the YAML file, then the flags that were given (not None).

    Raises
    ------
    UsageError
        If the file cannot be read, or a value is not allowed: names the setting, the value and what is expected.
    SettingsChecked
        Within `checking_only`.
    """
    values = _read_yaml(config) if config is not None else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        settings = model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" is {first['input']!r}"
        remedy = (
            f"known settings: {', '.join(model.model_fields)}"
            if first["type"] == "extra_forbidden"
            else first["msg"].removeprefix("Value error, ")
        )
        raise UsageError(f"setting {name!r}{given}: {remedy}") from None
    if _checking.get():
        raise SettingsChecked
    return settings


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {' '.join(str(error).split())}; give a readable YAML file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: holds a {type(values).__name__}; write 'name: value' lines")
    return values


def as_yaml(settings: Settings) -> str:
    """All settings as YAML, as printed and as stored with a run."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def without_credentials(settings: SettingsType) -> SettingsType:
    """The settings as they may be printed and stored: their URIs without users, passwords and keys."""
    from cxr_ray.storage import shown  # noqa: PLC0415 - pyarrow, which some commands do not need

    def without(value: object) -> object:
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: without(getattr(value, name)) for name in type(value).model_fields})
        if isinstance(value, dict):
            return {name: without(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(without(part) for part in value)
        return shown(value) if isinstance(value, str) else value

    return cast(SettingsType, without(settings))
