"""The demo as people see it: what happens now, a table, and what it means in plain words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

from rich import box
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clevagent.demo import frameworks
from clevagent.demo.acting import Scene, play
from clevagent.demo.results import SceneResult
from clevagent.demo.scenes import SCENES
from clevagent.demo.surroundings import kept_log, own_environment, plugins_of_others
from clevagent.demo.zombie import Zombie, watch
from clevagent.testing import LoopbackProvider
from clevagent_core.money import PICO_PER_USD

_FRAMES_PER_SECOND = 10
_INDENT = (0, 0, 0, 5)
_NUMBERS = {8: "Eight", 9: "Nine"}
_STOPPED_BY = {"ceiling": "by ceiling", "loop": "loop found", None: "by nothing"}
_NOT_STOPPED = {"ceiling": "nothing was refused for want of money", "loop": "the loop guard did not stop it"}
_NEXT = """\
model = clevagent.guard(model)
with clevagent.run(budgets=[clevagent.Budget(usd=0.50)]):
    agent.invoke(...)"""


def perform(console: Console | None = None) -> list[SceneResult]:
    """Play the demo on ``console`` and return its results. Touches nothing of the process's watchdog."""
    console = console or Console(highlight=False)
    begun_at = time.monotonic()
    scenes = [*SCENES, *frameworks.scenes()]
    _say(console, f"{_NUMBERS[len(scenes)]} runaway agents, each played without a guard, and then with one.", style="bold")
    _say(console, "Agents and clients are real. The provider is a server on this machine that keeps the bill: no key, no cost.")
    with own_environment(), kept_log() as records, _stage(console, len(scenes)) as stage:
        results = play(scenes, stage, block=plugins_of_others())
        zombie = watch()
    console.print("", result_table(results), "", sep="\n")
    for line in explanations(results):
        _say(console, line)
    _tell_zombie(console, zombie)
    if not frameworks.has_crewai():
        _say(console, 'CrewAI is not installed here, so no crew was played: pip install ".[demo,crewai]" adds it.\n')
    warned = f" {len(records)} warnings that ClevAgent logged were kept off this screen." if records else ""
    _say(console, f"Took {time.monotonic() - begun_at:.0f} s.{warned}\n", style="dim")
    _say(console, "Guard an agent of your own:\n")
    _say_indented(console, _NEXT)
    return results


def _tell_zombie(console: Console, zombie: Zombie) -> None:
    _say(console, "And one that spends nothing: its process lives, and its work stands still.", style="bold")
    shown = zombie.stack[-4:]
    lines = [
        f"health check  ok: the process lives, as {zombie.beats} heartbeats say",
        f"progress      none for {zombie.age_s:.0f} s",
        f"stuck in      {zombie.where}",
        *(f"              {_short(line)}" for line in shown),
        f"then          it ended itself with status {zombie.status}, for its supervisor to start it again (on_stall='exit')",
    ]
    _say_indented(console, "\n".join(lines))
    _say(console, "")


def _short(line: str) -> str:
    """Write a frame with the last two parts of its path."""
    return "/".join(PurePath(line).parts[-2:])


# -- while it plays -------------------------------------------------------------------------------------------------------


class Stage:
    """The demo's audience: tells each scene in lines that stay, and what happens now in one that changes."""

    def __init__(self, console: Console, scenes: int) -> None:
        self._console = console
        self._scenes = scenes
        self._now: Callable[[], str] = lambda: ""

    def scene_begins(self, number: int, scene: Scene) -> None:
        """Tell a scene's story."""
        _say(self._console, f"\n{number}/{self._scenes}  {scene.title}, ceiling {_cents(scene.ceiling_pico)}", style="bold")
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
        end = ", loop found" if result.act.stopped_by == "loop" else f", {result.act.refused} refused"
        for how, bill, rest in (("unguarded", result.unguarded, ""), ("guarded", result.guarded, end)):
            billed = f"{_money(bill.billed_pico)} billed, {_against(bill.billed_pico, result.ceiling_pico)}"
            _say(self._console, f"     {how:<11}{billed}; {bill.requests} sent{rest}")

    def frame(self) -> Text:
        """Draw the line that changes."""
        return Text(self._now(), style="cyan", no_wrap=True, overflow="ellipsis")


@contextmanager
def _stage(console: Console, scenes: int) -> Iterator[Stage]:
    stage = Stage(console, scenes)
    if not console.is_terminal or console.is_dumb_terminal:
        yield stage
        return
    with Live(get_renderable=stage.frame, console=console, refresh_per_second=_FRAMES_PER_SECOND, transient=True):
        yield stage


# -- afterwards -----------------------------------------------------------------------------------------------------------


def result_table(results: Sequence[SceneResult]) -> Table:
    """Lay the results out: two lines for each scene, in 79 characters."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, leading=1)
    table.add_column("Scene")
    for title in ("Unguarded\nbilled", "Guarded\nbilled", "Guarded\nrequests", "Ledger\nsays"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Verdict", max_width=10)
    for result in results:
        table.add_row(*_cells(result))
    return table


def _cells(result: SceneResult) -> list[Text]:
    unguarded, guarded, act, ceiling = result.unguarded, result.guarded, result.act, result.ceiling_pico
    agrees = ("equal" if result.tells_usage else "covers it") if result.agrees else "DISAGREES"
    return [
        _two_lines(result.title, f"  ceiling {_cents(ceiling)}"),
        _two_lines(_money(unguarded.billed_pico), _share(unguarded.billed_pico, ceiling), _alarm(unguarded.billed_pico > ceiling)),
        _two_lines(_money(guarded.billed_pico), _share(guarded.billed_pico, ceiling), _alarm(guarded.billed_pico > ceiling)),
        _two_lines(f"{guarded.requests} sent", f"{act.refused} refused"),
        _two_lines(_money(act.ledger_pico), agrees, _alarm(not result.agrees)),
        Text.assemble(_verdict(result), "\n", (_STOPPED_BY[act.stopped_by], "dim")),
    ]


def _two_lines(first: str, second: str, style: str = "dim") -> Text:
    return Text.assemble(first, "\n", (second, style))


def _alarm(is_bad: bool) -> str:  # noqa: FBT001 - a private word for a colour
    return "red" if is_bad else "dim"


def explanations(results: Sequence[SceneResult]) -> list[str]:
    """Say what the table means and what was seen, a paragraph each."""
    means = (
        "Billed is what the provider counted, and its part of the ceiling; the ledger is what ClevAgent counted. Where the provider "
        "tells what a call used, the two are equal to the last digit. A broken-off stream, a timeout or a killed process tells "
        "nothing: there the ledger counts the most that the call can cost, so it covers the bill, and stays within the ceiling.\n"
    )
    bad = [result for result in results if result.verdict != "held"]
    if bad:
        return [means, *(_complaint(result) for result in bad)]
    return [means, *_seen(results)]


def _seen(results: Sequence[SceneResult]) -> Iterator[str]:
    without = sum(result.unguarded.billed_pico for result in results)
    guarded = sum(result.guarded.billed_pico for result in results)
    most = max(result.unguarded_share for result in results)
    refused = sum(result.act.refused for result in results)
    yield (
        f"Unguarded, these agents cost {_cents(without)} and passed ceilings up to {most:.1f} times over. Guarded, they cost "
        f"{_cents(guarded)} and passed none: {refused} requests were refused before they were sent. What fitted was let through; a "
        "little stays unused, because a call is refused if the most that it can cost does not fit.\n"
    )
    for result in results:
        if result.means == "loop":
            sent, billed = result.guarded.requests, _cents(result.guarded.billed_pico)
            yield (
                f"{result.title}: found by what its calls brought, not by what they cost. It was stopped after {sent} calls and {billed}, "
                f"with {_cents(result.ceiling_pico - result.act.ledger_pico)} of its ceiling unspent.\n"
            )


def _complaint(result: SceneResult) -> str:
    billed, ledger, ceiling = _money(result.guarded.billed_pico), _money(result.act.ledger_pico), _money(result.ceiling_pico)
    numbers = f"billed {billed}, the ledger says {ledger} and holds {_money(result.act.held_pico)}, the ceiling is {ceiling}"
    what = {
        "PASSED": "the ceiling was passed",
        "DISAGREES": "the ledger does not agree with the bill",
        "NOTHING SENT": "everything was refused, which proves nothing",
        "NOT STOPPED": _NOT_STOPPED[result.means],
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
