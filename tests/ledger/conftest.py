"""A ledger in a file, here and in other processes that a test drives line by line."""

from __future__ import annotations

import ast
import math
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from clevagent.testing import FakeClock
from clevagent_core.ledger.account import Account, AccountKey, Hold, Line, Refusal
from clevagent_core.ledger.sqlite import SqliteLedger

TIMEOUT_S = 30.0
"""How long a test waits for another process before it calls that a hang."""
CEILING = 100

_LOOP = """
import sys
space = {"__name__": "other"}
for line in sys.stdin:
    try:
        kind, source = line[0], eval(line[1:])
        answer = eval(source, space) if kind == "=" else exec(source, space)
        print(repr(("answer", answer)), flush=True)
    except Exception as error:
        print(repr(("error", f"{type(error).__name__}: {error}")), flush=True)
"""


def is_ready(descriptor: int, timeout_s: float) -> bool:
    """Wait until something can be read. Not by ``select``, which knows no descriptor above 1023: clients of other tests hold many."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Other:
    """A Python process that does what it is told, and is killed at the end."""

    def __init__(self, prelude: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=folder
        )
        self.do(prelude)

    @property
    def pid(self) -> int:
        return self.process.pid

    def begin(self, source: str, kind: str = "!") -> None:
        """Let it do something, without waiting for the end; ``answer()`` tells it."""
        self.process.stdin.write(f"{kind}{source!r}\n".encode())  # type: ignore[union-attr]

    def do(self, source: str) -> None:
        self.begin(source)
        self.answer()

    def ask(self, expression: str) -> Any:
        self.begin(expression, "=")
        return self.answer()

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        descriptor, line = self.process.stdout.fileno(), b""  # type: ignore[union-attr]
        while not line.endswith(b"\n"):
            if not is_ready(descriptor, timeout_s):
                raise TimeoutError("the other process hangs")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise EOFError(f"the other process ended with {self.process.wait(timeout_s)}")
            line += chunk
        kind, value = ast.literal_eval(line.decode())
        if kind == "error":
            raise RuntimeError(value)
        return value

    def has_answered(self) -> bool:
        return is_ready(self.process.stdout.fileno(), 0)  # type: ignore[union-attr]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def finish(self) -> int:
        """Let it end by itself, as a program does that comes to its last line."""
        self.process.stdin.close()  # type: ignore[union-attr]
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


_PRELUDE = """
import contextlib, gc, logging, math, os, signal, sys, threading, time
from pathlib import Path
from clevagent.testing import FakeClock
from clevagent_core.ledger.account import AccountKey, Hold, Line, Refusal
from clevagent_core.ledger.sqlite import SqliteLedger
logging.getLogger("clevagent").setLevel(logging.CRITICAL)
ledger = SqliteLedger(Path({path!r}), FakeClock(), "other")
account = ledger.open(AccountKey("b", 0, "all", ""), ceiling={ceiling}, keep=0, warn_mark={ceiling}, ends_at=math.inf)
def take(amount):
    return ledger.reserve([Line(account, 0, True)], (amount, 0, 0, 0, 0, 0), expires_at=math.inf, owner=None)
def pay(hold, amount):
    ledger.settle(hold, (amount, 0, 0, 0, 0, 0))
def state():
    balance = ledger.balance(account)
    return balance.spent, balance.held
"""


class Here:
    """The same in this process."""

    def __init__(self, path: Path, ceiling: int = CEILING, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        self.ledger = SqliteLedger(path, self.clock, "here")
        self.account: Account = self.open(AccountKey("b", 0, "all", ""), ceiling)

    def open(self, key: AccountKey, ceiling: int = CEILING, **given: Any) -> Account:
        return self.ledger.open(key, **{"ceiling": ceiling, "keep": 0, "warn_mark": ceiling, "ends_at": math.inf, **given})

    def take(self, amount: int, *accounts: Account) -> Hold | Refusal:
        lines = [Line(account, account.key.unit, enforced=True) for account in accounts or (self.account,)]
        return self.ledger.reserve(lines, (amount,) * 6, expires_at=math.inf, owner=None)

    def hold(self, amount: int, *accounts: Account) -> Hold:
        answer = self.take(amount, *accounts)
        assert isinstance(answer, Hold), answer
        return answer

    def pay(self, hold: Hold, amount: int) -> None:
        self.ledger.settle(hold, (amount,) * 6)

    def state(self) -> tuple[int, int]:
        balance = self.ledger.balance(self.account)
        return balance.spent, balance.held

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.ledger._database.read(sql)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def other(path: Path) -> Iterator[Callable[..., Other]]:
    """Start a process that has the ledger open, with one account."""
    started: list[Other] = []

    def start(prelude: str = _PRELUDE, ceiling: int = CEILING) -> Other:
        started.append(Other(prelude.replace("{path!r}", repr(str(path))).replace("{ceiling}", str(ceiling)), path.parent))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def open_here(path: Path) -> Iterator[Callable[..., Here]]:
    """Open the ledger in this process, with the same account."""
    made: list[Here] = []

    def start(**given: Any) -> Here:
        made.append(Here(path, **given))
        return made[-1]

    yield start
    for here in made:
        here.ledger.close()


@pytest.fixture
def here(open_here: Callable[..., Here]) -> Here:
    return open_here()
