"""A ledger's file that cannot be used: every call is refused with what is wrong and what to do, and nothing is lost meanwhile."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from clevagent.testing import FakeClock
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.errors import BudgetExceeded, ClevAgentError, LedgerError, UsageError
from clevagent_core.ledger import database
from clevagent_core.ledger.account import Hold
from clevagent_core.ledger.database import Database
from clevagent_core.ledger.sqlite import SqliteLedger
from clevagent_core.ledger.statements import MIGRATIONS
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog

PRICES = {"m": Price(input=1, output=2)}


@pytest.fixture
def watch(path: Path):
    made: list[Watchdog] = []

    def make(**given: Any) -> Watchdog:
        budgets = [Budget(llm_calls=10, per="day", name="b")]
        settings = {"clock": FakeClock(), "ledger": str(path), "prices": PRICES, "budgets": budgets, "wait_s": 0}
        made.append(Watchdog(**settings | given))
        return made[-1]

    yield make
    for watchdog in made:
        with suppress(LedgerError):
            watchdog.shutdown()


def ask() -> LLMCall:
    return LLMCall(model="m", input=["hello"], max_output_tokens=10)


USED = Usage(input_tokens=5, output_tokens=5)


def told(work: Callable[[], object], path: Path, kind: type[ClevAgentError] = LedgerError) -> str:
    with pytest.raises(kind) as raised:
        work()
    assert type(raised.value) is kind
    return str(raised.value).replace(str(path.parent), "FOLDER")


# -- what cannot be opened ------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path, watch) -> None:
    path.write_text("my diary\n" * 200)
    assert told(watch, path) == snapshot(
        "The ledger 'FOLDER/ledger.db' could not be used: it is no SQLite database (file is not a database). What is spent could not be counted, so nothing was let through. Give the path of a ledger, or of a file that does not exist yet."
    )
    assert path.read_text() == "my diary\n" * 200


def test_a_database_of_another_program_is_refused_and_left_as_it_is(path, watch) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE account (name TEXT)")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    assert told(watch, path) == snapshot(
        "'FOLDER/ledger.db' is a database of another program, not a ledger, so nothing was written to it. Give ledger= the path of a file that ClevAgent may make."
    )
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT sql FROM sqlite_master").fetchall() == [("CREATE TABLE account (name TEXT)",)]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(path, watch) -> None:
    SqliteLedger(path, FakeClock()).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    assert told(watch, path) == snapshot(
        "The ledger 'FOLDER/ledger.db' was made by a newer ClevAgent (its version is 3, this one knows 2), so it was not touched. Install that version here too, or give this program a ledger of its own."
    )


def test_a_missing_folder_is_told_and_not_made(path, watch) -> None:
    assert told(lambda: watch(ledger=str(path.parent / "no" / "ledger.db")), path) == snapshot(
        "The ledger 'FOLDER/no/ledger.db' could not be used: it cannot be opened ([Errno 2] No such file or directory: 'FOLDER/no/ledger.db'). What is spent could not be counted, so nothing was let through. Make sure that its folder exists and that this user may write there; an absolute path in a URL has four slashes: sqlite:////var/lib/ledger.db."
    )
    assert list(path.parent.iterdir()) == []


def test_a_folder_is_no_ledger(path, watch) -> None:
    path.mkdir()
    assert told(watch, path) == snapshot(
        "The ledger 'FOLDER/ledger.db' could not be used: it cannot be opened (unable to open database file). What is spent could not be counted, so nothing was let through. Make sure that its folder exists and that this user may write there; an absolute path in a URL has four slashes: sqlite:////var/lib/ledger.db."
    )


def test_a_path_through_a_file_is_told(path, watch) -> None:
    path.write_text("")
    assert told(lambda: watch(ledger=str(path / "ledger.db")), path) == snapshot(
        "The ledger 'FOLDER/ledger.db/ledger.db' could not be used: it cannot be opened ([Errno 20] Not a directory: 'FOLDER/ledger.db/ledger.db'). What is spent could not be counted, so nothing was let through. Make sure that its folder exists and that this user may write there; an absolute path in a URL has four slashes: sqlite:////var/lib/ledger.db."
    )


def test_a_damaged_file_is_told(path, watch) -> None:
    watchdog = watch()
    for _ in range(3):
        watchdog.process_run.open(ask()).settle(USED)
    watchdog.shutdown()
    damaged = bytearray(path.read_bytes())
    damaged[100:] = b"\xa5" * (len(damaged) - 100)
    path.write_bytes(damaged)
    assert told(lambda: watch().process_run.open(ask()), path) == snapshot(
        "The ledger 'FOLDER/ledger.db' could not be used: it is damaged (database disk image is malformed). What is spent could not be counted, so nothing was let through. Keep a copy, put a backup in its place, or delete it: all totals then start from zero."
    )


@pytest.mark.parametrize("url", ["sqlite:///:memory:", "sqlite://", "sqlite:///", "sqlite:ledger.db", "sqlite:/var/lib/ledger.db"])
def test_a_url_that_names_no_file_is_told(url: str, path, watch, monkeypatch) -> None:
    monkeypatch.chdir(path.parent)
    message = told(lambda: watch(ledger=url), path, UsageError)
    assert message.replace(repr(url), "URL") == snapshot(
        "ledger=URL names no file, so nothing could be shared or kept. Write sqlite:///ledger.db (in the working directory), sqlite:////var/lib/ledger.db (absolute), or the path itself; for accounts in memory, ledger='memory'."
    )
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("url", ["", ":memory:", "redis://host/0", "postgres:///ledger.db"])
def test_a_url_of_something_else_is_told(url: str, path, watch, monkeypatch) -> None:
    monkeypatch.chdir(path.parent)
    assert repr(url) in told(lambda: watch(ledger=url), path, UsageError)
    assert list(path.parent.iterdir()) == []


def test_a_file_system_without_a_write_ahead_log_is_told(path, watch) -> None:
    assert told(lambda: database._refuse_other_mode(path, "delete"), path) == snapshot(
        "'FOLDER/ledger.db' cannot be shared by processes: SQLite's write-ahead log does not work there (the journal mode stays 'delete'). Put the ledger on a disk of this machine, not on a network drive."
    )


_UNPRIVILEGED = """
import os, sys
from pathlib import Path
path = Path({path!r})
from clevagent_core.watchdog import Watchdog
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall
from clevagent_core.errors import ClevAgentError
from clevagent_core.ledger import sqlite
from clevagent_core.pricing import Price
Watchdog().shutdown()  # all that is imported, while Python's own folder can be read
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    watchdog = Watchdog(ledger=str(path), budgets=[Budget(llm_calls=10, per="day", name="b")], prices={{"m": Price(input=1, output=2)}})
    watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
except ClevAgentError as error:
    print(type(error).__name__, error)
else:
    print("let through")
os._exit(0)
"""


def as_nobody(path: Path) -> str:
    for folder in path.parents[:4]:  # one more where pytest runs in several processes
        folder.chmod(folder.stat().st_mode | 0o055)
    script = _UNPRIVILEGED.format(path=str(path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip().replace(str(path.parent), "FOLDER")


@pytest.mark.slow
def test_a_file_that_may_not_be_written_is_told(path) -> None:
    SqliteLedger(path, FakeClock()).close()
    path.chmod(0o444)
    Path(f"{path}-lock").chmod(0o666)
    path.parent.chmod(0o777)
    assert as_nobody(path) == snapshot(
        "LedgerError The ledger 'FOLDER/ledger.db' could not be used: it cannot be written (attempt to write a readonly database). What is spent could not be counted, so nothing was let through. Make the file and its folder writable for this user, or give another path."
    )


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_is_told(path) -> None:
    path.parent.chmod(0o555)
    assert as_nobody(path) == snapshot(
        "LedgerError The ledger 'FOLDER/ledger.db' could not be used: it cannot be opened ([Errno 13] Permission denied: 'FOLDER/ledger.db'). What is spent could not be counted, so nothing was let through. Make sure that its folder exists and that this user may write there; an absolute path in a URL has four slashes: sqlite:////var/lib/ledger.db."
    )
    path.parent.chmod(0o755)


@pytest.mark.slow
def test_a_python_without_file_locks_is_told(tmp_path) -> None:
    """As on Windows. Everything else works there: what the file needs is imported when one is named."""
    script = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import clevagent\n"
        "clevagent.init(); clevagent.shutdown()\n"
        "assert 'sqlite3' not in sys.modules\n"
        "try: clevagent.init(ledger='sqlite:///x.db')\n"
        "except clevagent.UsageError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert "a ledger that processes share needs SQLite and the file locks of Linux or macOS" in ended.stdout
    assert "Use ledger='memory'" in ended.stdout


def test_a_folder_in_which_no_owner_file_can_be_made_is_told(path, watch, monkeypatch) -> None:
    from clevagent_core.ledger import sqlite

    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    watchdog = watch()
    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "lock_file", refuse)
        assert told(lambda: watchdog.process_run.open(ask()), path) == snapshot(
            "The ledger 'FOLDER/ledger.db' could not be used: the file 'FOLDER/ledger.db-owner-1', by whose lock other processes see that this one is alive, cannot be made ([Errno 13] Permission denied). Nothing was let through. Make the folder writable."
        )
        assert watchdog.ledger._database.read("SELECT count(*) FROM owner") == [(0,)]
    watchdog.process_run.open(ask()).settle(USED)


# -- trouble that begins while it is used ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_that_is_locked_by_another_program_refuses_and_settles_once_that_is_over(path, watch, monkeypatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    watchdog = watch()
    ticket = watchdog.process_run.open(ask())
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN EXCLUSIVE")
    assert told(lambda: watchdog.process_run.open(ask()), path) == snapshot(
        "The ledger 'FOLDER/ledger.db' could not be used: another program has held it locked for 5 s (database is locked). What is spent could not be counted, so nothing was let through. End that program (a backup, an open sqlite3 shell), then try again."
    )
    ticket.settle(USED)
    late = watchdog.start_run()
    late.end()
    shell.execute("ROLLBACK")
    shell.close()
    watchdog.process_run.open(ask()).settle(USED)
    assert watchdog.ledger._database.read("SELECT spent, held FROM account") == [(2, 0)]
    assert watchdog.ledger._database.read("SELECT count(*) FROM hold") == [(0,)]


@pytest.mark.slow
def test_what_is_logged_while_the_file_is_locked_is_told_and_recorded_before_the_next_call(path, watch, monkeypatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    watchdog = watch()
    watchdog.process_run.open(ask()).settle(USED)
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN EXCLUSIVE")
    for _ in range(2):
        watchdog.process_run.log(ask(), USED, None)
    shell.execute("ROLLBACK")
    shell.close()
    assert [incident.message.partition(":")[0] for incident in watchdog.recent if incident.kind == "ledger"] == [
        "What was logged is not recorded yet"
    ]
    assert watchdog.process_run.summary().total.calls == 3
    assert watchdog.ledger._database.read("SELECT spent, held FROM account") == [(1, 0)]
    watchdog.process_run.open(ask()).settle(USED)
    assert watchdog.ledger._database.read("SELECT spent, held FROM account") == [(4, 0)]


@pytest.mark.slow
def test_every_way_to_end_a_call_waits_for_the_trouble_to_be_over(path, open_here, monkeypatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.01)
    here = open_here()
    settled, released, charged, corrected = (here.hold(10) for _ in range(4))
    here.ledger.charge(corrected)
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN EXCLUSIVE")
    for work in (
        lambda: here.pay(settled, 1),
        lambda: here.ledger.release(released),
        lambda: here.ledger.charge(charged),
        lambda: here.pay(corrected, 4),
        lambda: here.take(1),
        lambda: here.ledger.top_up(here.account, 5),
    ):
        with pytest.raises(LedgerError):
            work()
    here.ledger.forget([here.account])
    shell.execute("ROLLBACK")
    shell.close()
    assert isinstance(here.take(5), Hold)
    assert here.state() == (1 + 10 + 4, 5)
    assert here.rows("SELECT over_at IS NOT NULL FROM account") == [(1,)]


def test_a_file_that_was_deleted_refuses_every_call_and_is_not_made_anew(path, watch) -> None:
    watchdog = watch()
    ticket = watchdog.process_run.open(ask())
    for found in path.parent.glob("ledger.db*"):
        found.unlink()
    assert told(lambda: watchdog.process_run.open(ask()), path) == snapshot(
        "The ledger 'FOLDER/ledger.db' was deleted or replaced while this process used it. Who starts now counts in another file, so no ceiling would hold, and nothing was let through. Start this process anew; to begin from zero, use `clevagent ledger reset`, which no process minds."
    )
    ticket.settle(USED)
    assert not path.exists()


def test_a_file_that_was_replaced_refuses_every_call_of_those_that_had_the_old_one(path, open_here, tmp_path) -> None:
    old = open_here()
    old.pay(old.hold(30), 30)
    for found in path.parent.glob("ledger.db*"):
        found.unlink()
    new = open_here()
    assert isinstance(new.take(100), Hold)
    with pytest.raises(LedgerError, match="deleted or replaced"):
        old.take(1)
    with pytest.raises(LedgerError, match="deleted or replaced"):
        old.state()
    assert new.state() == (0, 100)


def test_a_checkpoint_does_not_make_a_file_that_was_deleted(path, open_here) -> None:
    here = open_here()
    for found in path.parent.glob("ledger.db*"):
        found.unlink()
    with pytest.raises(sqlite3.OperationalError):
        database._checkpoint(here.ledger._database)
    assert not path.exists()


def test_a_dry_run_lets_calls_through_and_tells(path, watch, caplog) -> None:
    watchdog = watch(dry_run=True)
    for found in path.parent.glob("ledger.db*"):
        found.unlink()
    for _ in range(20):
        watchdog.process_run.open(ask()).settle(USED)
    assert {(incident.kind, incident.action) for incident in watchdog.recent} == {("ledger", "dry_run")}
    assert "was deleted or replaced while this process used it" in watchdog.recent[0].message


_FULL = """
import logging, resource, signal, sys
from pathlib import Path
from clevagent.testing import FakeClock
from clevagent_core.ledger.account import AccountKey, Hold, Line
from clevagent_core.ledger.sqlite import SqliteLedger
from clevagent_core.errors import LedgerError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logging.getLogger("clevagent").setLevel(logging.CRITICAL)
ledger = SqliteLedger(Path({path!r}), FakeClock(), "full")
def open_account(number):
    return ledger.open(AccountKey(f"b{{number}}", 0, "all", ""), ceiling=10**9, keep=0, warn_mark=10**9, ends_at=float("inf"))
account = open_account(0)
def take(amount):
    return ledger.reserve([Line(account, 0, True)], (amount, 0, 0, 0, 0, 0), expires_at=1, owner=None)
def pay(hold, amount):
    ledger.settle(hold, (amount, 0, 0, 0, 0, 0))
def fill(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def attempt(work):
    try:
        work()
    except LedgerError as error:
        return str(error)
def state():
    balance = ledger.balance(account)
    return balance.spent, balance.held
"""


@pytest.mark.slow
def test_a_full_disk_refuses_every_call_and_settles_once_there_is_room(path, other) -> None:
    there = other(_FULL.format(path=str(path)))
    there.do("hold = take(100)")
    there.do(f"fill({path.stat().st_size + 1000})")
    there.do("""
refused = []
for _ in range(300):
    answer = attempt(lambda: take(1))
    if answer:
        refused.append(answer)
""")
    assert there.ask("len(refused)") > 200
    assert there.ask("refused[-1]").replace(str(path.parent), "FOLDER") == snapshot(
        "The ledger 'FOLDER/ledger.db' could not be used: its disk failed or is full (disk I/O error). What is spent could not be counted, so nothing was let through. Look at the disk and at the system's log."
    )
    assert there.ask("attempt(lambda: pay(hold, 30)) is not None")
    there.do("room(); last = take(5); before = len(ledger.holds())")
    spent, held = there.ask("state()")
    assert spent == 30
    assert held == (there.ask("before") - 1) + 5
    assert there.ask("ledger._database.read('PRAGMA integrity_check')") == [("ok",)]


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_first_call_refuses_it_and_lets_the_next_ones_pass(path, other) -> None:
    there = other(_FULL.format(path=str(path)))
    there.do("fill(100)")
    assert "disk" in there.ask("attempt(lambda: take(1))")
    assert "disk" in there.ask("attempt(lambda: take(1))")
    assert list(path.parent.glob("*-owner-*")) == []
    there.do("room(); pay(take(7), 7)")
    assert there.ask("state()") == (7, 0)
    assert len(list(path.parent.glob("*-owner-*"))) == 1


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_breaks_no_program(path, other, open_here) -> None:
    there = other(_FULL.format(path=str(path)))
    there.do("take(40); fill(100); ledger.close()")
    assert there.finish() == 0
    here = open_here()
    account = here.ledger.open(here.account.key._replace(budget="b0"), ceiling=10**9, keep=0, warn_mark=1, ends_at=float("inf"))
    assert (here.ledger.balance(account).spent, here.ledger.balance(account).held) == (40, 0)


def test_a_run_that_ends_in_trouble_raises_nothing(path, watch) -> None:
    """Leaving the block must not hide what the program has worked out."""
    watchdog = watch()
    with watchdog.run(budgets=[Budget(llm_calls=5, name="r")]) as run:
        run.open(ask()).settle(USED)
        for found in path.parent.glob("ledger.db*"):
            found.unlink()
    watchdog.shutdown()


def test_a_ledger_that_is_closed_in_trouble_raises_nothing(path, open_here) -> None:
    here = open_here()
    here.hold(5)
    here.pay(here.hold(5), 5)
    for found in path.parent.glob("ledger.db*"):
        found.unlink()
    here.ledger.forget([here.account])
    here.ledger.close()


def test_a_folder_that_cannot_be_looked_into_any_more_is_told_as_every_other_trouble(path, open_here, monkeypatch) -> None:
    here = open_here()

    def refuse(self: Database) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_identity_now", refuse)
        assert told(lambda: here.take(1), path) == snapshot(
            "The ledger 'FOLDER/ledger.db' could not be used: it cannot be opened ([Errno 13] Permission denied: 'FOLDER/ledger.db'). What is spent could not be counted, so nothing was let through. Make sure that its folder exists and that this user may write there; an absolute path in a URL has four slashes: sqlite:////var/lib/ledger.db."
        )
        with pytest.raises(LedgerError):
            here.state()
    assert isinstance(here.take(1), Hold)


def test_usage_that_no_provider_can_mean_is_recorded_as_the_most_there_is_and_stops_the_budget(watch) -> None:
    watchdog = watch(budgets=[Budget(tokens=10**6, per="day", name="b"), Budget(usd=9_000_000, per="day", name="usd")])
    ticket = watchdog.process_run.open(ask())
    ticket.settle(Usage(input_tokens=10**30, output_tokens=1))
    with pytest.raises(BudgetExceeded):
        watchdog.process_run.open(ask())
    assert {state.budget: state.held for state in watchdog.process_run.summary().budgets} == {"b": 0, "usd": 0}
    assert all(state.spent >= state.ceiling for state in watchdog.process_run.summary().budgets)


def test_a_bound_that_no_ledger_can_hold_is_refused(watch) -> None:
    watchdog = watch(budgets=[Budget(tokens=10**6, per="day", name="b")])
    with pytest.raises(BudgetExceeded):
        watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10**30))


def test_an_account_that_an_operator_has_reset_does_not_go_below_zero(open_here) -> None:
    here = open_here()
    hold = here.hold(50)
    here.ledger.charge(hold)
    with here.ledger._database.transaction() as execute:
        execute("UPDATE account SET spent = 0")
    here.pay(hold, 10)
    assert here.state() == (0, 0)


def test_trouble_in_one_thread_leaves_the_lock_free_for_others(open_here, monkeypatch) -> None:
    here = open_here()
    with monkeypatch.context() as patch:
        patch.setattr(Database, "_identity_now", lambda self: (0, 0))
        with pytest.raises(LedgerError):
            here.take(1)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(here.take(1)))
    thread.start()
    thread.join(30)
    assert isinstance(answers[0], Hold)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    assert os.getpid() == here.ledger._pid
