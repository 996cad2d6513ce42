"""The demo as people see it: what happens now, a table, and what it means in plain words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clevagent.demo.results import SceneResult
from clevagent.demo.scenes import SCENES, Scene, play
from clevagent.demo.surroundings import kept_log, own_environment, plugins_of_others
from clevagent.testing import LoopbackProvider
from clevagent_core.money import PICO_PER_USD

_FRAMES_PER_SECOND = 10
_INDENT = (0, 0, 0, 5)
_NEXT = """\
model = clevagent.guard(model)
with clevagent.run(budgets=[clevagent.Budget(usd=0.50)]):
    agent.invoke(...)"""


def perform(console: Console | None = None) -> list[SceneResult]:
    """Play the demo on ``console`` and give its results. Takes some ten seconds; touches nothing of the process's watchdog."""
    console = console or Console(highlight=False)
    begun_at = time.monotonic()
    _say(console, "Four ways to overspend, each played without a guard, and then with one.", style="bold")
    _say(console, "Agents and client are real. The provider is a server on this machine that keeps the bill: no key, no cost.")
    with own_environment(), kept_log() as records, _stage(console) as stage:
        results = play(SCENES, stage, block=plugins_of_others())
    console.print(result_table(results))
    for line in explanations(results):
        _say(console, line)
    warned = f" {len(records)} warnings that ClevAgent logged were kept off this screen." if records else ""
    _say(console, f"Took {time.monotonic() - begun_at:.0f} s.{warned}\n", style="dim")
    _say(console, "Guard an agent of your own:\n")
    _say_indented(console, _NEXT)
    return results


# -- while it plays -------------------------------------------------------------------------------------------------------


class Stage:
    """The demo's audience: tells each scene in lines that stay, and what happens now in one that changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._now: Callable[[], str] = lambda: ""

    def scene_begins(self, number: int, scene: Scene) -> None:
        """Tell a scene's story."""
        _say(self._console, f"\n{number}/{len(SCENES)}  {scene.title}, ceiling {_cents(scene.ceiling_pico)}", style="bold")
        _say_indented(self._console, scene.story)

    def act_begins(self, scene: Scene, provider: LoopbackProvider, *, is_guarded: bool) -> None:
        """Watch the provider's bill."""
        ceiling = scene.ceiling_pico
        how = "guarded" if is_guarded else "unguarded"

        def now() -> str:
            billed = provider.billed_pico
            return f"     {how:<11}{_money(billed)} billed, {_against(billed, ceiling)}; {provider.request_count} sent"

        self._now = now

    def scene_ended(self, result: SceneResult) -> None:
        """Tell a scene's two bills."""
        self._now = lambda: ""
        for how, bill, rest in (("unguarded", result.unguarded, ""), ("guarded", result.guarded, f", {result.refused} refused")):
            billed = f"{_money(bill.billed_pico)} billed, {_against(bill.billed_pico, result.ceiling_pico)}"
            _say(self._console, f"     {how:<11}{billed}; {bill.requests} sent{rest}")

    def frame(self) -> Text:
        """Draw the line that changes."""
        return Text(self._now(), style="cyan", no_wrap=True, overflow="ellipsis")


@contextmanager
def _stage(console: Console) -> Iterator[Stage]:
    stage = Stage(console)
    if not console.is_terminal or console.is_dumb_terminal:
        yield stage
        return
    with Live(get_renderable=stage.frame, console=console, refresh_per_second=_FRAMES_PER_SECOND, transient=True):
        yield stage


# -- afterwards -----------------------------------------------------------------------------------------------------------


def result_table(results: Sequence[SceneResult]) -> Table:
    """Lay the results out: a column for each scene, so that it fits 80 characters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(result.title, justify="right", min_width=11)
    rows: tuple[tuple[str, Callable[[SceneResult], str]], ...] = (
        ("Ceiling", lambda result: _money(result.ceiling_pico)),
        ("Without a guard", lambda _: ""),
        ("  requests sent", lambda result: str(result.unguarded.requests)),
        ("  billed", lambda result: _money(result.unguarded.billed_pico)),
        ("  ceiling used", lambda result: _share(result.unguarded.billed_pico, result.ceiling_pico)),
        ("Guarded", lambda _: ""),
        ("  requests sent", lambda result: str(result.guarded.requests)),
        ("  requests refused", lambda result: str(result.refused)),
        ("  billed", lambda result: _money(result.guarded.billed_pico)),
        ("  ceiling used", lambda result: _share(result.guarded.billed_pico, result.ceiling_pico)),
        ("  overshoot", lambda result: _money(result.overshoot_pico)),
        ("  ledger says", lambda result: _money(result.ledger_pico)),
        ("  usage was told", lambda result: "yes" if result.tells_usage else "no"),
        ("  ledger agrees", lambda result: "yes" if result.agrees else "NO"),
    )
    for name, cell in rows:
        table.add_row(Text(name, style="" if name.startswith(" ") else "bold"), *map(cell, results))
    table.add_section()
    table.add_row(Text("Verdict", style="bold"), *map(_verdict, results))
    return table


def explanations(results: Sequence[SceneResult]) -> list[str]:
    """Say what the table means and what was seen, a paragraph each."""
    means = (
        "Billed is what the provider counted, the ledger what ClevAgent counted. Where the provider tells what a call used, they "
        "agree if they are equal to the last digit. A broken-off stream or a timeout tells nothing: there the ledger counts the "
        "most that the call can cost, so it agrees if it is not below the bill and not above the ceiling.\n"
    )
    bad = [result for result in results if result.verdict != "held"]
    if bad:
        return [means, *(_complaint(result) for result in bad)]
    without = sum(result.unguarded.billed_pico for result in results)
    guarded = sum(result.guarded.billed_pico for result in results)
    most = max(result.unguarded_share for result in results)
    refused = sum(result.refused for result in results)
    seen = (
        f"Unguarded, this work cost {_cents(without)} and passed its ceilings up to {most:.1f} times over. Guarded, it cost "
        f"{_cents(guarded)} and passed none: {refused} requests were refused before they were sent. What fitted was let through; a "
        "little stays unused, because a call is refused if the most that it can cost does not fit.\n"
    )
    return [means, seen]


def _complaint(result: SceneResult) -> str:
    billed, ledger, ceiling = _money(result.guarded.billed_pico), _money(result.ledger_pico), _money(result.ceiling_pico)
    numbers = f"billed {billed}, the ledger says {ledger}, the ceiling is {ceiling}"
    what = {
        "PASSED": "the ceiling was passed",
        "DISAGREES": "the ledger does not agree with the bill",
        "NOTHING SENT": "everything was refused, which proves nothing",
    }
    return f"{result.title}: {what[result.verdict]} ({numbers}). This is a bug of ClevAgent; please report it with this output.\n"


def _verdict(result: SceneResult) -> Text:
    return Text(result.verdict, style="bold green" if result.verdict == "held" else "bold red")


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line), style=style)


def _say_indented(console: Console, lines: str) -> None:
    console.print(Padding(Text(lines), _INDENT, expand=False))


def _against(pico: int, ceiling_pico: int) -> str:
    share = _share(pico, ceiling_pico)
    return f"{share} {'the' if pico > ceiling_pico else 'of the'} ceiling"


def _share(pico: int, ceiling_pico: int) -> str:
    """Write a part of the ceiling, rounded down below it, so that only what fills it reads 100 %; and its multiples as such."""
    if pico > ceiling_pico:
        return f"{pico / ceiling_pico:.2f} x"
    return f"{1000 * pico // ceiling_pico / 10:.1f} %"


def _money(pico: int) -> str:
    """Write an amount to the millionth of a dollar: the finest that a token of the demo's model costs."""
    return f"${pico / PICO_PER_USD:,.6f}"


def _cents(pico: int) -> str:
    return f"${pico / PICO_PER_USD:,.2f}"
