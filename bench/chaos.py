"""The chaos campaign of the DICOM node: studies go through it while everything around it is killed, filled, cut and stopped.

    python bench/chaos.py [--studies 2000] [--kills 30] [--seed N] [--store sqlite|postgresql|both] [--out FOLDER] [--json FILE]

Real peers: Orthanc, DCMTK and pynetdicom send to two `cxr-ray listen` on one spool and port; `cxr-ray serve` on Ray answers
them; Orthanc and a destination that can be made to fail receive the results. Faults happen at moments that the seed draws and
are told as they happen. When all is sent, everything is mended, and once nothing is under way any more it is counted: what
was answered 0x0000 has to be at every destination once, or be one dead letter. The table and the exit status say whether the
account balances; --out keeps the logs, the journals and the record that was counted. Everything runs on 127.0.0.1; root is
needed for a disk that can be filled, without which that fault is skipped.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from measuring import ROOT, commit, say

sys.path.insert(0, str(ROOT))

from chaos_campaign import Campaign, Options, Outcome, strays
from chaos_processes import CampaignError
from chaos_site import Site
from chaos_table import show
from serve_targets import bundle

_STUDIES_A_ROUND = 250
_EDGE = 64


def main() -> int:
    """Run the campaigns; 0 when every account balances, 1 when one does not, 2 when one could not be carried out."""
    options = _options()
    # Ctrl-C ends what runs here by way of `finally`; SIGTERM alike.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stores = ("sqlite", "postgresql") if options.store == "both" else (options.store,)
    outcomes: list[Outcome] = []
    say(f"seed {options.seed}, commit {commit()}")
    with _folder(options.out) as folder:
        network = bundle(folder, _EDGE, _EDGE)
        for store in stores:
            share = Options(
                studies=options.studies // len(stores),
                kills=-(-options.kills // len(stores)),
                seed=options.seed,
                rounds=max(1, options.studies // len(stores) // _STUDIES_A_ROUND),
                store=store,
            )
            say(f"{share.studies} studies, {share.kills} kills, store: {store}")
            try:
                outcomes.append(_campaign(share, folder / store, network))
            except CampaignError as error:
                say(f"the campaign could not be carried out: {error}")
                return 2
            _keep(outcomes[-1], folder / f"{store}-record.json")
        if options.json:
            options.json.write_text(json.dumps([_as_json(outcome) for outcome in outcomes], indent=1))
    for outcome in outcomes:
        show(outcome)
    return 0 if all(outcome.account.balances for outcome in outcomes) else 1


def _campaign(options: Options, folder: Path, network: Path) -> Outcome:
    folder.mkdir()
    # Sockets below it have paths of at most 107 bytes.
    ray_folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    postgres = ray_folder.with_name(f"{ray_folder.name}-pg")
    site = Site(folder, options.store, options.studies, ray_folder.name, network, ray_folder)
    try:
        with site:
            outcome = Campaign(options, site).run()
        outcome.account.problems["left over"] += strays(site)
        return outcome
    finally:
        for gone in (ray_folder, postgres, folder / "archive", folder / "source"):
            shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _folder(asked: Path | None) -> Iterator[Path]:
    """Where everything lies: kept where it was asked for, else removed at the end."""
    if asked is None:
        with tempfile.TemporaryDirectory(prefix="chaos-") as made:
            yield Path(made)
        return
    if asked.exists() and any(asked.iterdir()):
        raise SystemExit(f"--out {asked}: is not an empty folder; choose another place or remove it")
    asked.mkdir(parents=True, exist_ok=True)
    yield asked.resolve()


def _keep(outcome: Outcome, file: Path) -> None:
    file.write_text(outcome.record.as_json())


def _as_json(outcome: Outcome) -> dict[str, object]:
    return {
        "commit": commit(),
        "options": asdict(outcome.options),
        "seconds": round(outcome.seconds, 1),
        "kills": outcome.kills,
        "faults": outcome.faults,
        "skipped": outcome.skipped,
        "notes": outcome.notes,
        "letters": outcome.letters,
        "held": {name: [asdict(held) for held in both] for name, both in outcome.held.items()},
        "counts": outcome.account.counts,
        "problems": outcome.account.problems,
        "balances": outcome.account.balances,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="studies in all [2000]")
    parser.add_argument("--kills", type=int, default=30, help="kill -9, in all [30]")
    parser.add_argument("--seed", type=int, default=None, help="draws studies, senders and faults [one that is told]")
    parser.add_argument(
        "--store", choices=("sqlite", "postgresql", "both"), default="both", help="results store [both, by halves]"
    )
    parser.add_argument("--out", type=Path, help="empty folder that keeps logs, journals and record [none is kept]")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1_000_000)
    return options


if __name__ == "__main__":
    sys.exit(main())
