"""What travels with a job: the four packages as they are installed here, and the settings file that it names."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from cluster.command_line import SETTINGS_FILE
from cluster.errors import SubmitError

PACKAGES = ("cxr_ray", "ingest", "serve", "cluster")
# Beside Python: templates, styles and scripts of pages, and what databases are migrated by.
_SUFFIXES = frozenset({".py", ".html", ".css", ".js", ".mako"})


def runtime_environment(folder: Path, settings: str | None) -> dict[str, Any]:
    """Ray's runtime environment of a job: the packages, copied to `folder`, and the variables it needs.

    Parameters
    ----------
    settings
        Content of the YAML file that the command line names as `SETTINGS_FILE`; None if it names none.
    """
    environment: dict[str, Any] = {
        "py_modules": [str(_copy_package(package, folder / "packages")) for package in PACKAGES],
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }
    if settings is not None:
        working = folder / "working"
        working.mkdir()
        (working / SETTINGS_FILE).write_text(settings, encoding="utf-8")
        environment["working_dir"] = str(working)
    return environment


def _copy_package(package: str, folder: Path) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SubmitError(f"package {package!r} is not installed here; install cxr-ray again")
    origin = Path(spec.submodule_search_locations[0])
    sources = [path for path in origin.rglob("*") if path.suffix in _SUFFIXES or path.name == "py.typed"]
    for source in sources:
        target = folder / package / source.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return folder / package
