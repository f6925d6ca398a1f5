"""`cxr-ray deploy`: tells a cluster what to serve, and keeps it told."""

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.connection import reach
from cluster.deployment import Keeper, names, read_configuration
from cluster.deployment import deploy as deploy_configuration
from cluster.errors import SubmitError

_SECONDS_BETWEEN_LOOKS = 10.0

deploy = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@deploy.command()
def _deploy(
    configuration: Annotated[Path, typer.Argument(metavar="FILE", help="What 'cxr-ray serve --write-config' wrote.")],
    address: Annotated[
        str | None, typer.Option(help="URL of the cluster's dashboard [RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265].")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the cluster's token.")] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            help="PEM file with the authority of an https:// address's certificate [CXR_RAY_CA_FILE, else known ones]."
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Stay, and put it there again whenever the cluster has lost it or could not build it."),
    ] = False,
) -> None:
    """Put the service on a Ray cluster that runs."""
    try:
        read = read_configuration(configuration)
        if keep:
            _keep(Keeper(lambda: reach(address, token_file, ca_file), read, _tell))
        cluster = reach(address, token_file, ca_file)
        deploy_configuration(cluster, read)
    except SubmitError as error:
        sys.stderr.write(f"cxr-ray: {error}\n")
        raise SystemExit(error.code) from None
    _tell(f"{', '.join(names(read))} put on {cluster.address}")


def _keep(keeper: Keeper) -> NoReturn:
    while True:
        keeper.look()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
