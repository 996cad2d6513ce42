"""Ceilings that hold, or not: a ceiling that fits exactly 10 calls, 50 tried, against a provider on this machine that bills.

    .venv-peers/bin/python -m benchmarks.peers.ceilings                    # everyone, each way in a process of its own
    .venv-peers/bin/python -m benchmarks.peers.ceilings shekel.client      # one way, in this process, as JSON

Spent is what the *provider* billed (one token for each byte, and the whole output limit), as a share of the ceiling; beside it what
the peer says was spent. Whoever stops a call raises out of it; the caller catches that and tries the next one.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.peers import listed
from benchmarks.peers.ways import MODEL, OUTPUT_LIMIT, PROMPT, Attached, NotOffered, Setting, Way, chat_model, stay_here
from benchmarks.results import Section, contribute
from clevagent.testing import LoopbackProvider, Reply

ROOT = Path(__file__).resolve().parents[2]
CALL_PICO = len(PROMPT) * 2_500_000 + OUTPUT_LIMIT * 10_000_000
"""What one call is billed, in pico-USD: $2.50 and $10 for a million tokens."""
FITTING = 10
TRIES = 50
PROCESSES = 5
TIMEOUT_S = 240
CEILING_USD = FITTING * CALL_PICO / 1e12
DELAY_S = {"asyncio x50": 0.5, "threads x50": 0.5, "5 processes": 0.1}
"""How long an answer takes, so that calls made at once are really under way at once, as with any provider that thinks."""
MODES = ("sequential", "asyncio x50", "threads x50", "stream, consumer leaves", "5 processes")
NOTE = f"""\
A ceiling that fits exactly {FITTING} calls of `{MODEL}`, {TRIES} tried: what the provider billed, as a share of the ceiling (and what
the peer itself recorded). Above 1.00 the ceiling did not hold; below it, calls were refused that it could have paid for. The provider
is a real HTTP server on the same machine, and bills one token for each byte and the whole output limit; clients are real; every call
carries its output limit, and nothing retries, except that `guard(model)` keeps the default retries of its SDK. The caller catches what
is raised and tries again. Where calls are made at once an answer takes half a second. Threads are plain `threading.Thread`s. A stream is
left after its first piece. Five processes try ten calls each, one after the other, each answered in a tenth of a second, and share the
account where there is one that needs no server. "-" means not offered. agentguard47 holds a fixed rate for each token of the output
limit, which is more than this small ceiling has room for twice; under a larger one it would use more of it.
"""


class Tally:
    """What attempts met: by the names of exceptions, with the answered ones."""

    def __init__(self) -> None:
        self.met: Counter[str] = Counter()
        self.not_offered: NotOffered | None = None

    def attempt(self, call: Callable[[], object]) -> None:
        """Call, and catch whatever the peer, or the SDK under it, raises."""
        try:
            call()
        except NotOffered as error:
            self.not_offered = error
        except Exception as error:  # the caller of a peer that stops calls goes on, whatever is thrown at it
            self.met[type(error).__name__] += 1
        else:
            self.met["answered"] += 1

    async def attempt_async(self, attached: Attached) -> None:
        """Do the same with an asynchronous call."""
        try:
            await attached.acall()
        except Exception as error:  # as above
            self.met[type(error).__name__] += 1
        else:
            self.met["answered"] += 1


def sequential(attached: Attached, tally: Tally) -> None:
    for _ in range(TRIES):
        tally.attempt(attached.call)


def at_once(attached: Attached, tally: Tally) -> None:
    async def gather() -> None:
        await asyncio.gather(*(tally.attempt_async(attached) for _ in range(TRIES)))

    with asyncio.Runner() as runner:
        runner.run(gather(), context=contextvars.copy_context())


def threads(attached: Attached, tally: Tally) -> None:
    workers = [Thread(target=tally.attempt, args=(attached.call,)) for _ in range(TRIES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def left_streams(attached: Attached, tally: Tally) -> None:
    for _ in range(TRIES):
        tally.attempt(attached.broken)


ALONE: dict[str, Callable[[Attached, Tally], None]] = {
    "sequential": sequential,
    "asyncio x50": at_once,
    "threads x50": threads,
    "stream, consumer leaves": left_streams,
}


def model_for(way: Way, setting: Setting, name: str) -> Any:
    """Make the model that the way guards. ``guard(model)`` makes the SDK's retries itself, so it is left its default."""
    if not way.takes_model:
        return None
    return chat_model(setting.provider_url, **({"max_retries": 2} if name == "ours.guard" else {}))


def one_mode(name: str, mode: str, setting: Setting) -> dict[str, Any]:
    """Try 50 calls in one mode, under a fresh ceiling."""
    way = find(name)
    tally = Tally()
    try:
        with way.attach(model_for(way, setting, name), setting) as attached:
            ALONE[mode](attached, tally)
            spent = attached.spent_usd()
    except NotOffered as error:
        return {"not offered": str(error)}
    if tally.not_offered:
        return {"not offered": str(tally.not_offered)}
    return {"recorded": spent, "met": dict(tally.met)}


def one_process(name: str, setting: Setting) -> dict[str, Any]:
    """Do one process's part of a ceiling that several share."""
    way = find(name)
    tally = Tally()
    try:
        with way.attach(model_for(way, setting, name), setting) as attached:
            for _ in range(TRIES // PROCESSES):
                tally.attempt(attached.call)
            return {"recorded": attached.spent_usd(), "met": dict(tally.met)}
    except NotOffered as error:
        return {"not offered": str(error)}


def several_processes(name: str, _mode: str, setting: Setting) -> dict[str, Any]:
    """Start the processes and add up what they met. The account that is read last has everything in it."""
    if not find(name).is_shareable:
        return {"not offered": ""}
    setting = replace(setting, is_shared=True)
    command = [sys.executable, "-m", "benchmarks.peers.ceilings", name, setting.provider_url, str(setting.folder)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(PROCESSES)]
    parts = [json.loads(process.communicate()[0]) for process in started]
    if "not offered" in parts[0]:
        return parts[0]
    met = sum((Counter(part["met"]) for part in parts), Counter())
    recorded = [part["recorded"] for part in parts if part["recorded"] is not None]
    return {"recorded": max(recorded, default=None), "met": dict(met)}


def all_modes(name: str) -> dict[str, Any]:
    """Measure one way in every mode, in this process. The provider's bill decides."""
    cells = {}
    # Some peers write when their objects are collected: the folders stay until the end.
    with LoopbackProvider() as provider, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for mode in MODES:
            provider.reset([Reply(delay_s=DELAY_S.get(mode, 0))])
            own = Path(tempfile.mkdtemp(dir=folder))
            setting = Setting(ceiling_usd=CEILING_USD, provider_url=provider.openai_url, folder=own)
            measure_mode = one_mode if mode in ALONE else several_processes
            cell = measure_mode(name, mode, setting)
            cells[mode] = cell | {"billed": provider.billed_pico / 1e12, "requests": provider.request_count}
    return cells


def find(name: str) -> Way:
    """Look up ``peer.way``."""
    peer, _, key = name.partition(".")
    return listed.peer(peer).WAYS[key]


def show(cell: dict[str, Any]) -> str:
    """Write one cell: billed (recorded), as shares of the ceiling."""
    if "not offered" in cell:
        return "-"
    recorded = "" if cell["recorded"] is None else f" ({cell['recorded'] / CEILING_USD:.2f})"
    return f"{cell['billed'] / CEILING_USD:.2f}{recorded}"


def in_its_own_process(name: str) -> dict[str, Any]:
    """Run one way in a fresh interpreter, so that no peer's patches reach another."""
    command = [sys.executable, "-m", "benchmarks.peers.ceilings", name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{name} was not measured, its process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def remarks(who: str, cells: dict[str, Any]) -> list[str]:
    """Tell why a cell is empty, and where calls failed rather than being stopped: then nothing was answered at all."""
    found = []
    for mode, cell in cells.items():
        if cell.get("not offered"):
            found.append(f"{who}, {mode}: {cell['not offered']}")
        elif "met" in cell and not cell["met"].get("answered"):
            found.append(f"{who}, {mode}: no call succeeds; each raises {' or '.join(cell['met'])}, after it was billed")
    return found


def measure() -> int:
    """Measure everyone who has ceilings; print, and leave the table for the report."""
    rows, found, held = [], [], True
    print(NOTE + "\n" + " " * 28 + "".join(f"{mode:>30}" for mode in MODES))
    for peer, key, way in listed.ways():
        if not way.has_ceiling:
            continue
        cells = in_its_own_process(f"{peer}.{key}")
        who = f"{listed.peer(peer).DISTRIBUTION}: {way.label}"
        rows.append([who, *(show(cells[mode]) for mode in MODES)])
        found += remarks(who, cells)
        held = held and (peer != "ours" or all(cell["billed"] <= CEILING_USD * (1 + 1e-9) for cell in cells.values()))
        print(f"{who}\n{'billed (recorded)':<28}" + "".join(f"{cell:>30}" for cell in rows[-1][1:]))
        print(f"{'what 50 calls met':<28}" + "".join(f"{met(cells[mode]):>30}" for mode in MODES), flush=True)
    contribute("peer_ceilings", [section(rows, found)], distributions=listed.distributions())
    return 0 if held else 1


def met(cell: dict[str, Any]) -> str:
    """Write how many calls were answered and how many raised what."""
    return ", ".join(f"{count} {name}" for name, count in sorted(cell.get("met", {}).items(), key=lambda item: item[0].isupper()))


def section(rows: list[list[str]], found: list[str]) -> Section:
    """Make the table, for RESULTS.md and README.md. Ours stands in bold."""
    ours = listed.peer("ours").DISTRIBUTION
    shown = [[f"**{cell}**" if row[0].startswith(ours) else cell for cell in row] for row in rows]
    found = [*found, "shekel, 5 processes: it shares an account through a Redis server, which was not measured"]
    found += [f"{name}: left out, {reason}" for name, reason in listed.LEFT_OUT.items()]
    note = "\n".join([NOTE, *(f"- {remark}" for remark in found)])
    note += "\n\nLangfuse and LangSmith watch and stop nothing, so they are not in this table."
    return Section(title="Ceilings that hold", header=["", *MODES], rows=shown, note=note, marker="overshoot")


def main(arguments: list[str]) -> int:
    """Measure everyone, or one way in this process."""
    if not arguments:
        return measure()
    stay_here()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # handlers and peers log each refusal: hundreds of times here
    name, *shared = arguments
    if shared:
        url, folder = shared
        found = one_process(name, Setting(ceiling_usd=CEILING_USD, provider_url=url, folder=Path(folder), is_shared=True))
    else:
        found = all_modes(name)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
