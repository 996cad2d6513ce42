"""Processes that share a ceiling and are killed at any moment: what was really billed never passes it.

The bill is kept outside of the ledger: each process adds a line to one file before a call is sent, when it is billed, and when the
ledger knows.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from clevagent.testing import FakeClock
from clevagent_core.ledger.account import AccountKey
from clevagent_core.ledger.inspection import LedgerFile

WORKER = """
import json, logging, math, os, random, signal, sys
from pathlib import Path
from clevagent.testing import FakeClock
from clevagent_core.ledger.account import AccountKey, Line, Refusal
from clevagent_core.ledger import database
from clevagent_core.ledger.sqlite import SqliteLedger
logging.getLogger("clevagent").setLevel(logging.CRITICAL)
given = json.loads(sys.argv[1])
chance = random.Random(given["seed"])
bill = os.open(given["bill"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
ME = given["name"]

if given["kill_at"]:
    # In the middle of whatever it then does: before a statement, or after some steps of SQLite's machine.
    left = given["kill_at"]
    def count(*_):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0
    connect = database.connect
    def connect_and_count(path):
        connection = connect(path)
        if given["by"] == "statement":
            connection.set_trace_callback(count)
        else:
            connection.set_progress_handler(count, 3)
        return connection
    database.connect = connect_and_count

def note(kind, number, amount):
    os.write(bill, f"{kind} {ME} {number} {amount}\\n".encode())

ledger = SqliteLedger(Path(given["ledger"]), FakeClock(), ME)
def account(name, unit, ceiling):
    key = AccountKey(name, unit, "all", "")
    return ledger.open(key, ceiling=ceiling, keep=0, warn_mark=ceiling, ends_at=math.inf)
lines = [Line(account("usd", 0, given["ceiling"]), 0, True), Line(account("tokens", 1, 10**9), 1, True), Line(account("calls", 4, 10**6), 4, True)]
sent = 0
while sent < given["calls"]:
    bound = given["bound"] or chance.randint(1, 60)
    hold = ledger.reserve(lines, (bound, bound, 0, 0, 1, 0), expires_at=math.inf, owner=None)
    if isinstance(hold, Refusal):
        if hold.reason != "busy":
            break
        os.sched_yield()
        continue
    sent += 1
    note("sent", sent, bound)
    real = bound if given["bound"] else chance.randint(0, bound)
    note("billed", sent, real)
    ledger.settle(hold, (real, real, 0, 0, 1, 0))
    note("settled", sent, real)
ledger.close()
"""


class Fleet:
    """Processes at work on one ceiling, and their bill."""

    def __init__(self, folder: Path, ceiling: int) -> None:
        self.path, self.bill, self.ceiling = folder / "ledger.db", folder / "bill", ceiling
        self.bill.touch()
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, seed: int, *, bound: int = 0, calls: int = 10**9, kill_at: int = 0, by: str = "statement") -> str:
        name = f"w{len(self.started)}"
        given = {
            "seed": seed,
            "name": name,
            "ledger": str(self.path),
            "bill": str(self.bill),
            "ceiling": self.ceiling,
            "bound": bound,
            "calls": calls,
            "kill_at": kill_at,
            "by": by,
        }
        self.started[name] = subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(given)])
        return name

    def is_running(self, name: str) -> bool:
        return self.started[name].poll() is None

    def end(self) -> None:
        for process in self.started.values():
            process.wait(60)

    def close(self) -> None:
        for process in self.started.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait(60)

    def lines(self) -> list[tuple[str, str, int, int]]:
        return [
            (kind, name, int(number), int(amount))
            for kind, name, number, amount in map(str.split, self.bill.read_text().splitlines())
        ]

    def billed(self) -> int:
        return sum(amount for kind, _, _, amount in self.lines() if kind == "billed")


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest):
    made = Fleet(tmp_path, getattr(request, "param", 20_000))
    yield made
    made.close()


def check(fleet: Fleet, here) -> int:
    """After all have ended: nothing is held, and every account tells what was billed, or more where a process was killed."""
    killed = {name for name, process in fleet.started.items() if process.returncode != 0}
    assert all(process.returncode in {0, -9} for process in fleet.started.values())
    usd, tokens, calls = (
        here.open(AccountKey(name, unit, "all", ""), ceiling)
        for name, unit, ceiling in (("usd", 0, fleet.ceiling), ("tokens", 1, 10**9), ("calls", 4, 10**6))
    )
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    spent = {account.key.budget: here.ledger.balance(account) for account in (usd, tokens, calls)}
    assert [balance.held for balance in spent.values()] == [0, 0, 0]
    assert here.rows("SELECT count(*) FROM hold") == [(0,)]
    assert here.rows("PRAGMA integrity_check") == [("ok",)]
    # One may be left by a process that was killed before it was known; the next that comes takes it.
    assert len(list(fleet.path.parent.glob("*-owner-*"))) <= 1
    lines = fleet.lines()
    billed = fleet.billed()
    assert billed <= spent["usd"].spent <= fleet.ceiling
    assert spent["tokens"].spent == spent["usd"].spent
    # What is known exactly: every call but the last one of a process that was killed.
    last = Counter(name for kind, name, _, _ in lines if kind == "sent")
    settled = {(name, number): amount for kind, name, number, amount in lines if kind == "settled"}
    exact = sum(settled.values())
    assert exact <= spent["usd"].spent <= exact + sum(_most(lines, name, last[name], settled) for name in killed)
    assert 0 <= spent["calls"].spent - len(settled) <= len(killed)
    if not killed:
        assert spent["usd"].spent == billed == exact
    return billed


def _most(lines: list[tuple[str, str, int, int]], name: str, number: int, settled: dict[tuple[str, int], int]) -> int:
    """What the call in flight can be charged at most: its bound where it was sent, else that of the next one, never told."""
    if (name, number) in settled or number == 0:
        return 60
    return next(amount for kind, other, which, amount in lines if (kind, other, which) == ("sent", name, number))


@pytest.mark.slow
@pytest.mark.parametrize("by", ["statement", "step"])
def test_processes_killed_in_the_middle_of_what_sqlite_does_never_pass_the_ceiling(by: str, fleet, open_here) -> None:
    """Each is killed at a statement or a step that it has counted itself, and another one takes its place."""
    chance = random.Random(by)  # noqa: S311 - the same each time
    for round_number in range(5):
        names = [
            fleet.start(10 * round_number + number, kill_at=chance.randint(15, 150) * (1 if by == "statement" else 20), by=by)
            for number in range(3)
        ]
        for name in names:
            fleet.started[name].wait(60)
            assert fleet.billed() <= fleet.ceiling
    assert sum(process.returncode == -9 for process in fleet.started.values()) >= 10
    check(fleet, open_here())


def kill_at_random(fleet: Fleet, rounds: int) -> None:
    chance = random.Random(rounds)  # noqa: S311 - the same choices; the moments are what they are
    names = [fleet.start(number) for number in range(4)]
    for round_number in range(rounds):
        # A moment is all that is waited for: nothing depends on how far they are.
        with suppress(subprocess.TimeoutExpired):
            fleet.started[names[0]].wait(0.06 + chance.random() * 0.1)
        name = names.pop(chance.randrange(len(names)))
        fleet.started[name].kill()
        fleet.started[name].wait(60)
        assert fleet.billed() <= fleet.ceiling
        names.append(fleet.start(100 + round_number))
    for name in names:
        fleet.started[name].kill()
    fleet.end()


@pytest.mark.slow
def test_processes_killed_at_random_never_pass_the_ceiling(fleet, open_here) -> None:
    kill_at_random(fleet, 10)
    check(fleet, open_here())


@pytest.mark.slow
@pytest.mark.parametrize("fleet", [20_000, 400_000], indirect=True)
def test_many_processes_killed_at_random_never_pass_the_ceiling(fleet, open_here) -> None:
    kill_at_random(fleet, 150)
    check(fleet, open_here())


@pytest.mark.slow
@pytest.mark.parametrize("by", ["statement", "step"])
def test_a_process_killed_at_each_of_its_first_moments_never_breaks_the_file(by: str, fleet, open_here) -> None:
    for moment in range(1, 80):
        name = fleet.start(moment, calls=6, kill_at=moment * (1 if by == "statement" else 7), by=by)
        fleet.started[name].wait(60)
    check(fleet, open_here())


@pytest.mark.slow
@pytest.mark.parametrize("fleet", [12_000], indirect=True)
def test_calls_that_cost_what_they_reserve_use_the_ceiling_up(fleet, open_here) -> None:
    for number in range(4):
        fleet.start(number, bound=7)
    fleet.end()
    billed = check(fleet, open_here())
    assert billed / fleet.ceiling >= 0.9
    assert billed == fleet.ceiling // 7 * 7


@pytest.mark.slow
@pytest.mark.parametrize("fleet", [10**9], indirect=True)
def test_what_is_recorded_is_what_was_billed_to_the_last_unit(fleet, open_here) -> None:
    for number in range(4):
        fleet.start(number, calls=400)
    fleet.end()
    billed = check(fleet, open_here())
    assert len({name for _, name, _, _ in fleet.lines()}) == 4
    assert billed > 4 * 400 * 5


@pytest.mark.slow
def test_what_a_dead_fleet_held_is_charged_at_its_bound(fleet, open_here) -> None:
    """Each is killed between sending and hearing of it: the file knows the bound, the bill what it did cost."""
    for number in range(3):
        fleet.start(number, bound=50, calls=10, kill_at=0)
    fleet.end()
    before = fleet.billed()
    assert before == 3 * 10 * 50
    script = WORKER.replace('note("sent", sent, bound)', 'note("sent", sent, bound); os.kill(os.getpid(), signal.SIGKILL)')
    given = {"seed": 1, "name": "late", "ledger": str(fleet.path), "bill": str(fleet.bill), "ceiling": fleet.ceiling}
    given |= {"bound": 50, "calls": 5, "kill_at": 0, "by": "statement"}
    fleet.started["late"] = subprocess.Popen([sys.executable, "-c", script, json.dumps(given)])
    fleet.end()
    here = open_here()
    account = here.open(AccountKey("usd", 0, "all", ""), fleet.ceiling)
    assert here.ledger.balance(account).spent == before + 50
    assert here.ledger.balance(account).held == 0
    check(fleet, here)


@pytest.mark.slow
def test_an_operator_sees_who_died_with_calls_in_flight(fleet, other, path) -> None:
    there = other()
    there.do("take(20); take(30)")
    there.kill()
    file = LedgerFile(path)
    assert [(owner.pid, owner.is_alive, owner.calls_in_flight) for owner in file.owners()] == [(there.pid, False, 2)]
    assert [(record.balance.spent, record.balance.held) for record in file.accounts(FakeClock().wall())] == [(0, 50)]
    file.close()
