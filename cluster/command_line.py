"""A command of cxr-ray as the shell line of a job: checked here, its paths made absolute."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from cluster.credentials import told_secret, told_secret_in
from cluster.errors import SubmitError, last_line

COMMANDS = ("ingest", "train", "tune", "evaluate", "compare", "predict")
# The name of a settings file where the job runs.
SETTINGS_FILE = "settings.yaml"
# The others go on by themselves when they are run again.
_RESUMED = ("train",)
PATH_OPTIONS = (
    "data",
    "out",
    "release",
    "source",
    "bundle",
    "config",
    "labels",
    "patient-key-file",
    "init",
    "input",
    "clinical",
    "train-list",
    "val-list",
    "test-list",
    "scores",
    "prevalence",
    "boxes",
    "bundles",
)
# Values of --init that are no paths.
NAMED_WEIGHTS = ("random", "imagenet")
# NAME=URI, as the command itself reads it.
_NAMED = re.compile(r"(\w[\w.+-]*)=(.+)")


@dataclass(frozen=True)
class CommandLine:
    """A command that runs as a job.

    Attributes
    ----------
    arguments
        The command and its options, as after ``cxr-ray``; a settings file is `SETTINGS_FILE` among them.
    settings
        Content of that file; None if there is none.
    """

    arguments: tuple[str, ...]
    settings: str | None = None

    @property
    def entrypoint(self) -> str:
        """The shell line that runs it on the cluster."""
        # Without -P, a checkout in the folder where the cluster was started would go before the code that is uploaded.
        return shlex.join(["python", "-P", "-m", "cxr_ray", *self.arguments])

    def again(self) -> "CommandLine":
        """The command that goes on where this one failed."""
        if self.arguments[0] not in _RESUMED or "--resume" in self.arguments:
            return self
        return replace(self, arguments=(*self.arguments, "--resume"))


def command_line(arguments: Sequence[str], folder: Path) -> CommandLine:
    """Make a command ready for the cluster: paths absolute, the settings file read.

    Parameters
    ----------
    arguments
        The command and its options, as after ``cxr-ray``.
    folder
        What relative paths among them, and in its settings file, are relative to.

    Raises
    ------
    SubmitError
        If the command is not one that runs as a job, its settings file cannot be read or is one of several, or a URI tells a
        password or a key.
    """
    if arguments and arguments[0].startswith("-"):
        raise SubmitError(f"No such option: {arguments[0]} ('cxr-ray submit --help' lists the options)", code=2)
    if not arguments or arguments[0] not in COMMANDS:
        given = f"command {arguments[0]!r} does not run as a job" if arguments else "no command is given"
        raise SubmitError(f"{given}; submit one of: {', '.join(COMMANDS)}", code=2)
    if said := told_secret_in(arguments):
        raise SubmitError(said, code=2)
    made, file = _without_config(absolute_paths(arguments, folder))
    return CommandLine(tuple(made), None if file is None else _settings(Path(file), folder))


def check(arguments: Sequence[str]) -> None:
    """Have the command itself check its options and settings, without running it.

    Raises
    ------
    SubmitError
        In the words of the command.
    """
    checked = subprocess.run(  # noqa: S603 - our own interpreter and package
        [sys.executable, "-P", "-m", "cxr_ray", "check", *arguments], capture_output=True, text=True, check=False
    )
    if checked.returncode:
        said = last_line(checked.stderr).removeprefix("cxr-ray: ")
        raise SubmitError(said, code=checked.returncode)


def _without_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments with the settings file under the name that it has on the cluster, and where it is here."""
    made, files = list(arguments), []
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            made[position + 1] = SETTINGS_FILE
            files.append(arguments[position + 1])
        elif argument.startswith("--config="):
            made[position] = f"--config={SETTINGS_FILE}"
            files.append(argument.partition("=")[2])
    if len(files) > 1:
        raise SubmitError(f"--config {files[1]}: is the second settings file; a command takes one, join them", code=2)
    return made, files[0] if files else None


def _settings(file: Path, folder: Path) -> str:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SubmitError(f"--config {file}: {error}; give a readable YAML file", code=2) from None
    if not isinstance(settings, dict):
        return ""
    for name, value in settings.items():
        if said := told_secret(f"--config {file}: {name}", value):
            raise SubmitError(said, code=2)
        option = str(name).replace("_", "-")
        if option in PATH_OPTIONS:
            settings[name] = _absolute_setting(option, value, folder)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _absolute_setting(option: str, value: object, folder: Path) -> object:
    """The same value, which in YAML may be a list or a mapping, with its paths made absolute."""
    if isinstance(value, dict):
        # Names and paths: a comma or a '=' is the path's own.
        of_each = "bundle" if option == "bundles" else option
        return {name: _absolute_setting(of_each, part, folder) for name, part in value.items()}
    if isinstance(value, list):
        return [_absolute_element(option, part, folder) for part in value]
    return _absolute(option, value, folder) if isinstance(value, str) else value


def _absolute_element(option: str, part: object, folder: Path) -> object:
    named = option == "bundles" and isinstance(part, str)
    return _named(str(part), folder) if named else _absolute_setting(option, part, folder)


def absolute_paths(arguments: Sequence[str], folder: Path) -> list[str]:
    """The same arguments with the local paths of `PATH_OPTIONS` made absolute; URIs stay as they are."""
    made: list[str] = []
    option = ""
    for argument in arguments:
        if option:
            made.append(_absolute(option, argument, folder))
            option = ""
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        is_path = argument.startswith("--") and name in PATH_OPTIONS
        if is_path and equals:
            made.append(f"--{name}={_absolute(name, value, folder)}")
        else:
            made.append(argument)
            option = name if is_path else ""
    return made


def _absolute(option: str, value: str, folder: Path) -> str:
    if option == "bundles":
        # NAME=URI, or a URI, separated by commas.
        return ",".join(_named(part, folder) for part in value.split(","))
    if not value or "://" in value or (option == "init" and value in NAMED_WEIGHTS):
        return value
    # Not resolved: a link may lead elsewhere on the cluster.
    return str(folder / Path(value).expanduser())


def _named(part: str, folder: Path) -> str:
    if found := _NAMED.fullmatch(part.strip()):
        return f"{found[1]}={_absolute('bundle', found[2], folder)}"
    return _absolute("bundle", part.strip(), folder)
