"""The `cxr-ray` command: finds the command that is called and loads only that one.

Importing torch and Ray takes seconds; the list of commands has to answer at once. So the table below names each command's
function as text, and nothing is imported before it is called.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("serve.cli:demo", "The whole way on synthetic radiographs: ingest, train, evaluate, serve, C-STORE"),
    "ingest": ("ingest.cli:app", "Turn a release, DICOM files or phantoms into a dataset (nih, dicom, phantom)"),
    "train": ("cxr_ray.cli:train", "Train a preset on a dataset; the result is a bundle"),
    "tune": ("cxr_ray.cli:tune", "Search for good training settings: trainings side by side, poor ones stopped early"),
    "evaluate": ("cxr_ray.cli:evaluate", "Score a bundle on a dataset's test split"),
    "compare": ("cxr_ray.compare_cli:compare", "Train several presets, score them on the same images: the table of a paper"),
    "presets": ("cxr_ray.preset_cli:presets", "List the networks and what was published about them"),
    "bundle": ("cxr_ray.cli:bundle", "Look at a bundle, or export it (show, verify, export)"),
    "predict": ("serve.predict_cli:predict", "Answer a folder of images at once; the result is a Parquet file"),
    "serve": ("serve.cli:serve", "Answer over HTTP; with --with-node also over DICOM"),
    "listen": ("serve.cli:listen", "Receive studies by C-STORE and send them to a running service"),
    "deadletter": ("serve.node.deadletter_cli:deadletter", "What got no answer or was refused, and why (list, show, replay)"),
    "deliveries": ("serve.node.deadletter_cli:deliveries", "Results that wait to be sent, for whom, since when and why"),
    "token": ("serve.token_cli:app", "Bearer tokens of the service (add, list, revoke)"),
    "history": ("serve.history_cli:app", "What is known of patients' earlier visits (import, show)"),
    "audit": ("serve.audit_cli:audit", "Who read or changed which study"),
    "deploy": ("cluster.deploy_cli:deploy", "Put the service on a Ray cluster, and keep it there"),
    "submit": ("cluster.cli:submit", "Run ingest, train, tune, evaluate, compare or predict as a job on a Ray cluster"),
    "jobs": ("cluster.jobs_cli:jobs", "Jobs on a Ray cluster (list, logs, stop)"),
    "cluster": ("cluster.local_cli:local", "A Ray cluster of several nodes on this machine (up, status, down)"),
}
# Those that begin with their settings: 'cxr-ray check COMMAND ...' goes that far.
CHECKED = ("ingest", "train", "tune", "evaluate", "compare", "predict", "serve", "listen", "demo")
HELP_FLAGS = ("--help", "-h")


def main() -> None:
    """Run the command named by the first argument; exit 2 for bad usage, 1 for failed work, 130 when interrupted."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP_FLAGS:
        sys.stdout.write(_overview())
        return
    if arguments[0] == "--version":
        from cxr_ray import __version__  # noqa: PLC0415

        sys.stdout.write(f"cxr-ray {__version__}\n")
        return
    if arguments[0] == "check":
        _check(arguments[1:])
        return
    if arguments[0] not in COMMANDS:
        _fail(f"command {arguments[0]!r} is not known; use one of: {', '.join(COMMANDS)}", 2)
    # Before anything imports Ray, which reads these once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _call(arguments[0], arguments[1:])


def _check(arguments: list[str]) -> None:
    """Check a command's options and settings, and leave it at that."""
    if not arguments or arguments[0] not in CHECKED:
        _fail(f"check {' '.join(arguments[:1])}: check one of: {', '.join(CHECKED)}", 2)
    from cxr_ray.settings import SettingsChecked, checking_only  # noqa: PLC0415

    try:
        with checking_only():
            _call(arguments[0], arguments[1:])
    except SettingsChecked:
        sys.stdout.write(f"{arguments[0]}: options and settings are valid\n")


def command_app(name: str) -> "typer.Typer":
    """Load the Typer application of a command."""
    module, function = COMMANDS[name][0].split(":")
    app: typer.Typer = getattr(importlib.import_module(module), function)
    return app


def _call(name: str, arguments: list[str]) -> None:
    import typer  # noqa: PLC0415

    from cxr_ray.errors import CxrRayError, UsageError  # noqa: PLC0415

    # The base of all complaints about options and arguments, under whichever name this Typer keeps its Click.
    bad_usage: type[Exception] = typer.BadParameter.__mro__[1]
    app = command_app(name)
    try:
        raise SystemExit(app(args=arguments, prog_name=f"cxr-ray {name}", standalone_mode=False))
    except bad_usage as error:
        if not arguments:
            sys.stderr.write(f"{error}\n")
            raise SystemExit(2) from None
        _fail(f"{error.format_message()} ('cxr-ray {name} --help' lists the options)", 2)  # type: ignore[attr-defined]
    except UsageError as error:
        _fail(str(error), 2)
    except CxrRayError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"cxr-ray: {' '.join(message.split())}\n")
    raise SystemExit(code)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "Chest radiographs in, probabilities of fourteen diseases out, on Ray.\n\n"
        f"Usage: cxr-ray COMMAND [OPTIONS]\n\nCommands:\n{lines}\n\n"
        "'cxr-ray COMMAND --help' lists the options of a command, 'cxr-ray check COMMAND ...' checks them and their settings.\n"
    )


if __name__ == "__main__":
    main()
