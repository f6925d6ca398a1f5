"""What a study costs in bytes, files and seconds: the unit costs that docs/scaling-studies.md multiplies.

    python bench/study_costs.py database | dataset | driver | listing | dispatch | chain | all     [--smoke]

- database: bytes of rows, indexes and pictures in PostgreSQL (a server of its own) and SQLite, at two sizes, so that growth is
  seen to be a line; a page and its count; recording an answer, its write-ahead log, and pg_dump.
- dataset: bytes of manifest.json for a shard and for an image left out, and opening it; the order of an epoch.
- driver: memory of the ingest's driver by what holds it, two sizes apart; the columns that a training's driver reads.
- listing: what the node does with its folders at every look and at the start, by the number of files in them.
- dispatch: the dispatcher's CPU for an instance of 10 MB, sent to a server that swallows it, and while the service is away.
- chain: `cxr-ray serve`, `cxr-ray listen` and DCMTK's storescp with a backlog of 10 MB films: answers, results and deliveries a
  second, CPU, and what stays of a study in the spool. Ports are free ones, so the front is Serve's own proxy.

Everything is the product's own code. CPU is counted where it can be, as it drifts less than time beside other work. Figures are
printed as Markdown for RESULTS.md; --smoke takes sizes that show that a part works, and measures nothing.
"""

import argparse
import os

from measuring import origin
from study_costs_chain import chain
from study_costs_ingest import dataset, driver, driver_child
from study_costs_node import dispatch, listing, swallow_child
from study_costs_store import database
from study_costs_table import print_costs


def main() -> None:
    """Run what the first argument names."""
    parts = {part.__name__: part for part in (database, dataset, driver, listing, dispatch, chain)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*parts, "all", "driver-child", "swallow-child"])
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="sizes that show that a part works")
    given = parser.parse_args()
    if given.what == "driver-child":
        driver_child(given.number)
    elif given.what == "swallow-child":
        swallow_child(given.number)
    else:
        for name in parts if given.what == "all" else (given.what,):
            begun = origin(f"study_costs.py {name}{' --smoke' * given.smoke}")
            print_costs(name, parts[name](given.smoke), begun)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
