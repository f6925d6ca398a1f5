"""`cxr-ray deploy`: tells a cluster what to serve, and keeps it told."""

import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.connection import reach
from cluster.deployment import Keeper, names, read_configuration
from cluster.deployment import deploy as deploy_configuration
from cluster.terminal import Address, CaFile, TokenFile, in_one_line, write

_SECONDS_BETWEEN_LOOKS = 10.0

deploy = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@deploy.command()
def _deploy(
    configuration: Annotated[Path, typer.Argument(metavar="FILE", help="What 'cxr-ray serve --write-config' wrote.")],
    address: Address = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Stay, and put it there again whenever the cluster has lost it or could not build it."),
    ] = False,
) -> None:
    """Put the service on a Ray cluster that runs."""
    with in_one_line():
        read = read_configuration(configuration)
        if keep:
            _keep(Keeper(lambda: reach(address, token_file, ca_file), read, _tell))
        cluster = reach(address, token_file, ca_file)
        deploy_configuration(cluster, read)
        _tell(f"{', '.join(names(read))} put on {cluster.address}")


def _keep(keeper: Keeper) -> NoReturn:
    while True:
        keeper.look()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _tell(line: str) -> None:
    write(f"{line}\n")
