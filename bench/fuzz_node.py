"""Tens of thousands of associations that break the protocol, against a listener in a process of its own.

    python bench/fuzz_node.py [--associations N] [--seed S] [--workers W]

Each association starts as an honest one, with an instance to store, and one mutation is worked into it: bits and lengths of
PDUs, items and command sets, order and nesting, contexts that were never negotiated, UIDs that are paths, ends in the middle.
What it is depends on the seed and the number of the association alone. After every so many, and all the time from a thread
beside, an honest peer stores an instance and has to be told success. The campaign fails where the listener ends, an honest
peer is not served, an honest instance is missing from the spool, or anything is left behind: files in ``incoming/``, threads,
descriptors. Memory is that of the listener's process. The last line is the result as JSON.
"""

import argparse
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from measuring import ROOT, environment, origin, say

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dicom_peers import LISTENER, RELEASE, Wire, instance, request, store_pdus  # noqa: E402
from fuzz_mutations import CONTEXTS, KINDS  # noqa: E402

_SETTINGS = {
    "port": 0,
    "min_free_bytes": 0,
    "max_associations": 32,
    "max_connections": 128,
    "acse_timeout_seconds": 2,
    "dimse_timeout_seconds": 2,
    "network_timeout_seconds": 2,
    "max_object_bytes": 1_000_000,
}
_PATIENCE = 20.0
_HONEST_EVERY = 50
# Not more threads, files and memory than these after the campaign than before it, once all peers are gone.
_MORE_THREADS, _MORE_DESCRIPTORS, _MORE_MIB = 0, 0, 64


@dataclass
class Campaign:
    """What is counted while it runs."""

    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    honest: int = 0
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0
    guard: threading.Lock = field(default_factory=threading.Lock)


def attack(port: int, seed: int, number: int, campaign: Campaign) -> None:
    """One association that breaks the protocol; notes how it was answered."""
    draw = random.Random(f"{seed}-{number}")
    kind = draw.choice(list(KINDS))
    first, then = KINDS[kind](draw, instance(SOPInstanceUID=f"1.2.826.{seed}.{number}"))
    said = "nothing"
    with suppress(OSError), Wire(port, 6) as wire:
        wire.send(first)
        answer, _ = wire.read() if then else (0, b"")
        if then and answer == 2:
            wire.send(then)
        ends = draw.random()
        if ends < 0.3:
            # A reset: nothing is read, not even what is on its way.
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            said = "not read"
        elif ends < 0.95:
            wire.socket.shutdown(socket.SHUT_WR)
            said = _last_word(wire)
        else:
            said = _last_word(wire)
    with campaign.guard:
        campaign.kinds[kind] += 1
        campaign.answers[said] += 1


def _last_word(wire: Wire) -> str:
    names = {2: "accept", 3: "reject", 4: "response", 6: "release", 7: "abort"}
    last = "close"
    while (kind := wire.read()[0]) in names:
        last = names[kind]
    return last


def honest(port: int, campaign: Campaign, uids: list[str]) -> None:
    """Store an instance as one should; whatever goes wrong is a failure of the campaign."""
    content = instance()
    began = time.monotonic()
    try:
        with Wire(port, _PATIENCE) as wire:
            kind, body = wire.send(request(*CONTEXTS)).read()
            if kind != 2:
                raise OSError(f"no accept but {kind} {body[:8].hex()}")
            status = wire.send(*store_pdus(content)).status()
            if status or wire.send(RELEASE).read()[0] != 6:
                raise OSError(f"status {status:04X}, or no release")
    except (OSError, AssertionError) as error:
        campaign.failed.append(f"{type(error).__name__} {error}")
        return
    with campaign.guard:
        campaign.honest += 1
        campaign.slowest = max(campaign.slowest, time.monotonic() - began)
        uids.append(str(content.SOPInstanceUID))


@dataclass(frozen=True)
class State:
    """What a process holds."""

    rss_mib: float
    peak_mib: float
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> "State":
        """Of a living process."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        kib = [int(status[name].split()[0]) for name in ("VmRSS", "VmHWM")]
        return cls(kib[0] / 1024, kib[1] / 1024, int(status["Threads"]), sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))


def settled(pid: int, before: State) -> State:
    """The state once no peer is left, or after a while."""
    patience = time.monotonic() + _PATIENCE
    state = State.of(pid)
    while state.threads > before.threads or state.descriptors > before.descriptors:
        if time.monotonic() > patience:
            break
        time.sleep(0.2)
        state = State.of(pid)
    return state


def run(associations: int, seed: int, workers: int) -> dict[str, object]:
    """The campaign; returns what it counted."""
    campaign, uids = Campaign(), list[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz-node-") as folder:
        spool, log = Path(folder) / "spool", Path(folder) / "listener.log"
        with log.open("wb") as complaints:
            process = subprocess.Popen(
                [sys.executable, "-c", LISTENER, str(spool), json.dumps(_SETTINGS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                env=environment(),
            )
            try:
                assert process.stdout
                assert process.stdin
                port = int(process.stdout.readline())
                before, after = _attack_all(process.pid, port, associations, seed, workers, campaign, uids)
                alive = process.poll() is None
                process.stdin.close()
                process.wait(30)
            finally:
                process.kill()
                process.wait()
        left = sum(1 for _ in (spool / "incoming").iterdir())
        missing = len(set(uids) - _stored(spool))
        said = log.read_text(errors="replace")
    return {
        "associations": sum(campaign.kinds.values()),
        "seed": seed,
        "kinds": dict(campaign.kinds.most_common()),
        "answers": dict(campaign.answers.most_common()),
        "honest": campaign.honest,
        "honest_failed": campaign.failed,
        "honest_missing": missing,
        "slowest_honest_s": round(campaign.slowest, 2),
        "before": vars(before),
        "after": vars(after),
        "alive": alive,
        "left_in_incoming": left,
        "tracebacks": said.count("Traceback"),
        "failures_in_log": said.count("association failed"),
    }


def _attack_all(
    pid: int, port: int, associations: int, seed: int, workers: int, campaign: Campaign, uids: list[str]
) -> tuple[State, State]:
    for _ in range(_HONEST_EVERY):
        honest(port, campaign, uids)
    # The last peer's connection is still being closed.
    time.sleep(1)
    before = State.of(pid)
    ended = threading.Event()

    def beside() -> None:
        while not ended.wait(0.5):
            honest(port, campaign, uids)

    companion = threading.Thread(target=beside)
    companion.start()
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, associations, _HONEST_EVERY):
                numbers = range(start, min(start + _HONEST_EVERY, associations))
                for outcome in [pool.submit(attack, port, seed, number, campaign) for number in numbers]:
                    outcome.result()
                honest(port, campaign, uids)
                if start // 1000 != (start + _HONEST_EVERY) // 1000:
                    done, state = start + _HONEST_EVERY, State.of(pid)
                    rate = done / (time.monotonic() - began)
                    say(f"{done} associations, {rate:.0f}/s, {state.rss_mib:.0f} MiB, {len(campaign.failed)} failed")
    finally:
        ended.set()
        companion.join()
    return before, settled(pid, before)


def _stored(spool: Path) -> set[str]:
    from serve.node.file_meta import read_meta

    return {read_meta(path).sop_instance_uid for path in (spool / "ready").glob("*.dcm")}


def problems(result: dict) -> list[str]:
    """Why the campaign failed; empty where it did not."""
    before, after = result["before"], result["after"]
    checks = {
        "the listener ended": not result["alive"],
        "honest peers were not served": bool(result["honest_failed"]),
        "honest instances are missing": result["honest_missing"] > 0,
        "files are left in incoming/": result["left_in_incoming"] > 0,
        "threads are left": after["threads"] > before["threads"] + _MORE_THREADS,
        "descriptors are left": after["descriptors"] > before["descriptors"] + _MORE_DESCRIPTORS,
        "memory has grown": after["peak_mib"] > before["rss_mib"] + _MORE_MIB,
        "the listener failed within": result["tracebacks"] + result["failures_in_log"] > 0,
    }
    return [words for words, is_so in checks.items() if is_so]


def report(result: dict, command: str) -> None:
    """Print the table."""
    before, after = result["before"], result["after"]
    say(f"\n{origin(command)}\n")
    say("| | |")
    say("|---|---|")
    say(f"| associations that break the protocol | {result['associations']:,} (seed {result['seed']}) |")
    failed, missing = len(result["honest_failed"]), result["honest_missing"]
    say(f"| honest stores between and beside them | {result['honest']:,}, failed {failed}, missing {missing} |")
    say(f"| slowest honest store | {result['slowest_honest_s']} s |")
    within = result["failures_in_log"] + result["tracebacks"]
    say(f"| listener alive, failures within | {'yes' if result['alive'] else 'no'}, {within} |")
    say(f"| memory before, after, peak | {before['rss_mib']:.0f}, {after['rss_mib']:.0f}, {after['peak_mib']:.0f} MiB |")
    say(f"| threads before, after | {before['threads']}, {after['threads']} |")
    say(f"| descriptors before, after | {before['descriptors']}, {after['descriptors']} |")
    say(f"| files left in incoming/ | {result['left_in_incoming']} |")
    say("\n| mutation | associations |\n|---|---|")
    for kind, count in result["kinds"].items():
        say(f"| {kind} | {count:,} |")
    say("\n| last word of the listener | associations |\n|---|---|")
    for answer, count in result["answers"].items():
        say(f"| {answer} | {count:,} |")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--associations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=12)
    given = parser.parse_args()
    result = run(given.associations, given.seed, given.workers)
    report(result, "python bench/fuzz_node.py " + " ".join(sys.argv[1:]))
    failed = problems(result)
    for words in failed:
        say(f"FAILED: {words}")
    say(json.dumps(result))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
