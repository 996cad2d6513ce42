"""What the ledger in a file costs: one process, and four that never rest.

    python benchmarks/ledgers.py

Three budgets (US dollars, tokens, calls), each with one account; a reservation over all of them, and its settlement.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.results import Section, contribute
from clevagent_core.budgets import LLM_CALLS, TOKENS, USD
from clevagent_core.clock import SystemClock
from clevagent_core.ledger.account import AccountKey, Hold, Ledger, Line
from clevagent_core.ledger.memory import MemoryLedger
from clevagent_core.ledger.sqlite import SqliteLedger

CALLS = 10_000
BLOCKS = 5
PROCESSES = 4
AMOUNTS = (3_000_000_000, 1_200, 1_000, 200, 1, 0)
UNITS = (USD, TOKENS, LLM_CALLS)
BIG = 10**18
"""Ceilings that no benchmark reaches, in any unit."""

NOTE = f"""\
Wall time of one reservation over three budgets and of its settlement, the least of {BLOCKS} medians over {CALLS} calls. SQLite: one
file, in WAL mode with synchronous=NORMAL, so a call that is held survives the death of its process. Afterwards what the file says is
compared with what the processes settled.
"""


def lines_of(ledger: Ledger) -> list[Line]:
    """Open three accounts."""
    keys = [AccountKey(f"budget {unit}", unit, "all", "") for unit in UNITS]
    accounts = [ledger.open(key, ceiling=BIG, keep=0, warn_mark=BIG, ends_at=inf) for key in keys]
    return [Line(account, unit, enforced=True) for account, unit in zip(accounts, UNITS, strict=True)]


def timed(ledger: Ledger, lines: Sequence[Line], calls: int) -> tuple[list[float], list[float]]:
    """Reserve and settle; give how long each took, in seconds."""
    reserving, settling = [], []
    clock = time.perf_counter
    for _ in range(calls):
        start = clock()
        hold = ledger.reserve(lines, AMOUNTS, expires_at=inf, owner=None)
        held = clock()
        assert isinstance(hold, Hold)
        ledger.settle(hold, AMOUNTS)
        settling.append(clock() - held)
        reserving.append(held - start)
    return reserving, settling


def worker(path: str) -> None:
    """Be one of several processes: wait for the signal, then never rest."""
    ledger = SqliteLedger(Path(path), SystemClock())
    lines = lines_of(ledger)
    print("ready", flush=True)
    sys.stdin.readline()
    reserving, settling = timed(ledger, lines, CALLS)
    print(json.dumps({"worst": max(*reserving, *settling), "settled": CALLS}), flush=True)
    ledger.close()


def together(path: Path) -> tuple[float, float]:
    """Let several processes saturate one file: operations a second in all, and the longest that one of them took."""
    command = [sys.executable, str(Path(__file__).resolve()), str(path)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    for process in workers:
        process.stdout.readline()
    start = time.perf_counter()
    for process in workers:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [json.loads(process.stdout.readline()) for process in workers]
    seconds = time.perf_counter() - start
    for process in workers:
        process.communicate()
    return 2 * PROCESSES * CALLS / seconds, max(one["worst"] for one in told)


def main() -> None:
    """Measure, print and contribute."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        for name, ledger in (("memory", MemoryLedger()), ("SQLite", SqliteLedger(path, SystemClock()))):
            lines = lines_of(ledger)
            timed(ledger, lines, CALLS // 10)
            blocks = [timed(ledger, lines, CALLS) for _ in range(BLOCKS)]
            for what, index, target in (("reserve", 0, 30), ("settle", 1, 35)):
                medians = [statistics.median(block[index]) * 1e6 for block in blocks]
                rows.append((f"{name}: {what}, median", f"{min(medians):.1f} us", f"<= {target} us" if name == "SQLite" else "-"))
        spent = ledger.balance(lines[0].account).spent
        rate, worst = together(path)
        everything = ledger.balance(lines[0].account).spent
        assert everything - spent == PROCESSES * CALLS * AMOUNTS[0], "a settlement was lost"
        ledger.close()
    rows.append(
        (f"SQLite: {PROCESSES} processes that never rest, operations in all", f"{rate:,.0f} a second", ">= 20 000 a second")
    )
    rows.append((f"SQLite: {PROCESSES} processes that never rest, worst wait", f"{worst * 1e3:.1f} ms", "<= 60 ms"))
    for row in rows:
        print("{:<66} {:>22}   target {}".format(*row))
    contribute("ledgers", [Section(title="The ledger, three budgets", header=("", "measured", "target"), rows=rows, note=NOTE)])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(sys.argv[1])
    else:
        main()
