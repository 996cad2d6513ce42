"""Five real processes on one ceiling that is kept in a file, of which one is killed in the middle of a call.

Nothing is left to chance but the order of the other four: who goes when is settled by pipes and by what the provider has received.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

from clevagent.demo.acting import Scene
from clevagent.demo.results import GuardedAct
from clevagent.demo.worker import BUDGET, READY, Orders
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.ledger.inspection import LedgerFile
from clevagent_core.money import format_usd

_WAIT_S = 60.0
"""How long anything may take before the demo says that it failed."""
_UNANSWERED = Reply(delay_s=2 * _WAIT_S)
_ANSWERED = Reply(delay_s=0.05)
_RECEIVED = 2
"""How many requests the provider has when the first process is in the middle of its second call, alone."""
_OTHERS_AT_WORK = 4


@dataclass(frozen=True, kw_only=True)
class SharedCeiling(Scene):
    """Processes that try the same calls, one of which is killed while it waits for an answer that it is billed for."""

    processes: int
    tries: int
    """How many calls each of them makes."""

    def play_unguarded(self, provider: LoopbackProvider) -> None:
        """Let them work with nothing between them and the provider."""
        with TemporaryDirectory(prefix="clevagent-demo-") as folder:
            self._work(provider, Path(folder), None, ())

    def play_guarded(self, provider: LoopbackProvider, block: Sequence[str]) -> GuardedAct:
        """Let them work on one ceiling, and read in its file what came of it."""
        with TemporaryDirectory(prefix="clevagent-demo-") as folder:
            path = Path(folder, "ledger.db")
            refused = self._work(provider, Path(folder), str(path), block)
            return _read(path, refused)

    def _work(self, provider: LoopbackProvider, folder: Path, ledger: str | None, block: Sequence[str]) -> int:
        """Play the workers' hour; tell how many calls were refused to those that lived."""
        orders = Orders(base_url=provider.openai_url, tries=self.tries, ceiling=self.ceiling, ledger=ledger, block=block)
        with ExitStack() as stack:
            victim, *others = [stack.enter_context(_worker(orders, folder / f"worker-{n}")) for n in range(self.processes)]
            for worker in (victim, *others):
                worker.expect(READY)
            victim.begin()
            _await(provider, _RECEIVED)
            for worker in others:
                worker.begin()
            _await(provider, _OTHERS_AT_WORK)
            victim.kill()
            return sum(int(worker.hear()) for worker in others)


def replies() -> list[Reply]:
    """Give what the provider answers: all but the second request, which the first process makes."""
    return [_ANSWERED, _UNANSWERED, _ANSWERED]


def _read(path: Path, refused: int) -> GuardedAct:
    file = LedgerFile(path)
    try:
        records = list(file.accounts(time.time()))
    finally:
        file.close()
    (balance,) = [record.balance for record in records if record.balance.key.budget == BUDGET]
    return GuardedAct(ledger_pico=balance.spent, held_pico=balance.held, refused=refused, stopped_by="ceiling" if refused else None)


def _await(provider: LoopbackProvider, count: int) -> None:
    if not provider.wait_for_requests(count, timeout_s=_WAIT_S):
        raise RuntimeError(
            f"The demo's processes have made {provider.request_count} calls in {_WAIT_S:g} s where {count} were expected (billed so "
            f"far: {format_usd(provider.billed_pico)}), so this scene cannot be played. Please report it, with what this computer is."
        )


class _Worker:
    """A process of :mod:`clevagent.demo.worker`. What it writes to its error output is kept in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self._input, self._output = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)

    def begin(self) -> None:
        """Let it go."""
        self._input.write(b"!")

    def expect(self, line: str) -> None:
        """Wait until it says ``line``."""
        if self.hear() != line:
            raise self._failure("said something else than expected")

    def hear(self) -> str:
        """Wait for the next line that it says."""
        said, deadline = b"", time.monotonic() + _WAIT_S
        while not said.endswith(b"\n"):
            # Not select.select(), which knows no descriptor above 1023.
            with selectors.DefaultSelector() as selector:
                selector.register(self._output, selectors.EVENT_READ)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failure(f"has not answered for {_WAIT_S:g} s")
            received = os.read(self._output.fileno(), 4096)
            if not received:
                raise self._failure("ended before its work was done")
            said += received
        return said.decode().strip()

    def kill(self) -> None:
        """Kill it as nothing can prevent (SIGKILL), whether or not it has ended, and wait until it is gone."""
        self._process.kill()
        self._process.wait(_WAIT_S)

    def end(self) -> None:
        """Kill it, and close what led to it."""
        self.kill()
        self._output.close()
        with suppress(BrokenPipeError):
            self._input.close()

    def _failure(self, what: str) -> RuntimeError:
        log = self._log.read_text(errors="replace").strip()
        return RuntimeError(
            f"A process of the demo ({self._process.pid}) {what}, so this scene cannot be played. "
            + (f"It wrote:\n{log}" if log else "It wrote nothing.")
        )


@contextmanager
def _worker(orders: Orders, log: Path) -> Iterator[_Worker]:
    """Start a worker, and let none be left behind."""
    command = [sys.executable, "-P", "-m", "clevagent.demo.worker", json.dumps(asdict(orders))]
    # What this process can import, and nothing that happens to lie in the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with log.open("wb") as errors:
        # A group of its own: Ctrl-C is for the demo, which ends its workers itself.
        process = subprocess.Popen(  # noqa: S603 - this module, by this interpreter
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0, env=environment, process_group=0
        )
    worker = _Worker(process, log)
    try:
        yield worker
    finally:
        worker.end()
