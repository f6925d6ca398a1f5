"""Commands whose options are the fields of their settings: one description of each, in one place."""

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from cxr_ray.settings import SettingsType, load_settings
from cxr_ray.terminal import single_command

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def settings_command(model: type[SettingsType], run: Callable[[SettingsType, bool], None], help_text: str) -> typer.Typer:
    """A command with an option for each field of `model`, besides ``--config`` and ``--json``.

    Values reach the model as they were typed, so that what is wrong with one is told in the model's words.

    Parameters
    ----------
    run
        Called with the settings and whether the result is wanted as JSON.
    """

    def command(**given: Any) -> None:
        config, json = given.pop("config"), given.pop("json")
        run(load_settings(model, config, given), json)

    parameters = [_parameter(name, field) for name, field in model.model_fields.items()]
    parameters += [
        _option("config", Path | None, None, help="YAML file with settings; flags override it."),
        inspect.Parameter(
            "json",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--json", help="Print the result as JSON.")],
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = help_text
    return single_command(command)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kinds = _kinds(field.annotation)
    flag = name.replace("_", "-")
    text = f"{field.description or ''}{_default(field)}"
    if bool in kinds:
        off = "" if field.default is False else f"/--no-{flag}"
        return _option(name, bool | None, None, f"--{flag}{off}", help=text)
    return _option(name, str | None, None, f"--{flag}", help=text, metavar=_metavar(kinds))


def _option(name: str, kind: Any, default: object, *declared: str, **attributes: Any) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(*declared, show_default=False, **attributes)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have, None left out."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)


def _metavar(kinds: tuple[Any, ...]) -> str:
    for kind in kinds:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
    return _METAVARS.get(kinds[0], "TEXT")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (needed)"
    return "" if field.default is None or field.default is False else f" [{field.default}]"
