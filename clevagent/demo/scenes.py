"""Ways in which agents run away: each is played without a guard, and then guarded.

Nothing is scripted but the provider's answers. The work of a scene does not know whether its model is guarded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from langchain.agents import create_agent
from langchain_core.language_models.chat_models import BaseChatModel
from openai import APITimeoutError

from clevagent import Budget, BudgetExceeded, LoopDetected, LoopGuard, RunSummary, Watchdog, guard
from clevagent.demo.acting import CENT_CALL, PRICES, PROMPT, Scene, chat_model
from clevagent.demo.processes import SharedCeiling, replies
from clevagent.demo.results import GuardedAct, Means
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.money import PICO_PER_USD

_TRIES = 50
_TIMED_OUT_TRIES = 20
_FRUITLESS = 39
"""After so many answers that lead nowhere the script ends the agent that nobody guards; nothing else would."""
_SCANNED_LINE = "|w1dget, lrg . . . . . . . .|  4|  12,5O|....5O.0O?|  smudge: sprockeL, s  m|   1O|   3,1l|\n"
_PAGE_LINE = "Figures for the last quarter are published on another page; please search for the last quarter's figures. "


@dataclass(frozen=True, kw_only=True)
class ModelScene(Scene):
    """Work of this process with one model, or with what is built on one: a client, a graph, a crew."""

    work: Callable[[Any], None]
    """What is done with it. Ends when the work is done or is refused."""
    make: Callable[[str, Mapping[str, Any]], Any] = chat_model
    """Makes it, of a provider's address and of ``model``."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model."""

    def play_unguarded(self, provider: LoopbackProvider) -> None:
        """Work with it as it is."""
        self.work(self.make(provider.openai_url, self.model))

    def play_guarded(self, provider: LoopbackProvider, block: Sequence[str]) -> GuardedAct:
        """Work with it guarded, in a run that has the ceiling."""
        watchdog = Watchdog(agent="demo", prices=PRICES, block=block)
        try:
            guarded = guard(self.make(provider.openai_url, self.model), watchdog=watchdog)
            stopped_by: Means | None = None
            with watchdog.run(budgets=[Budget(usd=self.ceiling)], guards=self.guards()) as run:
                try:
                    self.work(guarded)
                except BudgetExceeded:
                    stopped_by = "ceiling"
                except LoopDetected:
                    stopped_by = "loop"
            return _act(run.summary(), stopped_by)
        finally:
            watchdog.shutdown()

    def guards(self) -> Sequence[object]:
        """Give the guards that the run has beside its ceiling."""
        return ()


@dataclass(frozen=True, kw_only=True)
class LoopScene(ModelScene):
    """Work that the loop guard is to stop, long before the ceiling."""

    means: ClassVar[Means] = "loop"

    def guards(self) -> Sequence[object]:
        """Stop a loop, where the built-in guard would only warn of it."""
        return [LoopGuard()]


def _act(summary: RunSummary, stopped_by: Means | None) -> GuardedAct:
    # Work that goes on after each refusal raises nothing; the account remembers.
    if stopped_by is None and any(state.latched for state in summary.budgets):
        stopped_by = "ceiling"
    return GuardedAct(
        # Amounts of a summary are floats, which keep every pico-USD up to $9 000.
        ledger_pico=sum(round(state.spent * PICO_PER_USD) for state in summary.budgets),
        held_pico=sum(round(state.held * PICO_PER_USD) for state in summary.budgets),
        refused=summary.refusals,
        stopped_by=stopped_by,
    )


# -- the work of each scene -----------------------------------------------------------------------------------------------


def read_invoice(number: str) -> str:
    """Read an invoice from its scan."""
    return f"SCAN OF INVOICE {number}\n{_SCANNED_LINE * 12}TOTAL |......|....../ (page torn)\nconfidence 0.31"


def _parse_again(model: BaseChatModel) -> None:
    agent = create_agent(model, [read_invoice], system_prompt="You are an accountant. Find each invoice's total. Do not guess.")
    question = {"role": "user", "content": "What is the total of invoice 4711?"}
    agent.invoke({"messages": [question]}, {"recursion_limit": 10 * _FRUITLESS})


def search(query: str) -> str:
    """Search the company's pages."""
    return f"1 page found for {query!r}: intranet/figures"


def open_page(url: str) -> str:
    """Open a page."""
    return f"PAGE {url}\n{_PAGE_LINE * 80}"


def _go_in_circles(model: BaseChatModel) -> None:
    agent = create_agent(model, [search, open_page], system_prompt="You answer questions from the company's pages.")
    question = {"role": "user", "content": "What did we earn in the last quarter?"}
    agent.invoke({"messages": [question]}, {"recursion_limit": 10 * _FRUITLESS})


def _fan_out(model: BaseChatModel) -> None:
    answers = model.batch([PROMPT] * _TRIES, {"max_concurrency": _TRIES}, return_exceptions=True)
    _raise_unless(answers, BudgetExceeded)


def _break_off(model: BaseChatModel) -> None:
    for _ in range(_TRIES):
        with suppress(BudgetExceeded):
            for _chunk in model.stream(PROMPT):
                break


def _time_out(model: BaseChatModel) -> None:
    answers = model.batch([PROMPT] * _TIMED_OUT_TRIES, {"max_concurrency": _TIMED_OUT_TRIES}, return_exceptions=True)
    _raise_unless(answers, BudgetExceeded, APITimeoutError)


def _raise_unless(answers: Sequence[object], *expected: type[Exception]) -> None:
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, expected):
            raise answer


SCENES = (
    ModelScene(
        title="Re-parsing agent",
        story="The model cannot use what its tool answers, so it asks for the same again, each time with a longer history. "
        f"The script ends it after {_FRUITLESS + 1} calls; nothing else would.",
        ceiling="0.10",
        work=_parse_again,
        replies=[Reply(text="", tool_calls=[("read_invoice", {"number": "4711"})])] * _FRUITLESS
        + [Reply(text="I cannot find the total of this invoice.")],
        tells_usage=True,
        model={"max_tokens": 400},
        billing={"tokens_per_byte": 0.25, "output_share": 0.25},
    ),
    ModelScene(
        title="Fan-out of 50",
        story=f"{_TRIES} calls of $0.01 start at once, on {_TRIES} threads; the ceiling has room for 10.",
        ceiling="0.10",
        work=_fan_out,
        replies=[Reply(delay_s=0.25)],
        tells_usage=True,
        model=CENT_CALL,
    ),
    ModelScene(
        title="Streams broken off",
        story=f"{_TRIES} answers of $0.01 are streamed, and the reader leaves each after its first words. All are billed in full.",
        ceiling="0.10",
        work=_break_off,
        replies=[Reply(text="Dear customer, thank you for the many letters.", chunks=8)],
        tells_usage=False,
        model=CENT_CALL,
    ),
    ModelScene(
        title="Retries after timeouts",
        story=f"The provider is too slow for {_TIMED_OUT_TRIES} calls of $0.01. OpenAI's client gives up and sends each twice more, as it "
        "does by default; every request is billed.",
        ceiling="0.10",
        work=_time_out,
        replies=[Reply(hang=True)],
        tells_usage=False,
        model={**CENT_CALL, "timeout": 0.5},
    ),
    SharedCeiling(
        title="Five processes",
        story="Five processes try 10 calls of $0.01 each, on one ceiling that is kept in a file. One is killed (SIGKILL) while the "
        "provider works on its second call; that is billed, and nobody lives who could be told.",
        ceiling="0.10",
        processes=5,
        tries=10,
        replies=replies(),
        tells_usage=False,
    ),
    LoopScene(
        title="Going in circles",
        story="The agent searches, opens the page that it found, searches again: every call succeeds and nothing new comes of it. "
        f"The ceiling is far away. Unguarded, the script ends it after {_FRUITLESS + 1} calls; nothing else would.",
        ceiling="5.00",
        work=_go_in_circles,
        replies=[
            Reply(text="", tool_calls=[("search", {"query": "figures last quarter"})]),
            Reply(text="", tool_calls=[("open_page", {"url": "intranet/figures"})]),
        ]
        * (_FRUITLESS // 2)
        + [Reply(text="", tool_calls=[("search", {"query": "figures last quarter"})])]
        + [Reply(text="I cannot find the figures.")],
        tells_usage=True,
        model={"max_tokens": 400},
        billing={"tokens_per_byte": 0.25, "output_share": 0.25},
    ),
)
