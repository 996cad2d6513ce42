"""Four ways in which agents spend too much: each is played without a guard, and then guarded by its ceiling.

Nothing is scripted but the provider's answers. The work of a scene does not know whether its model is guarded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from langchain.agents import create_agent
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_openai import ChatOpenAI
from openai import APITimeoutError

from clevagent import Budget, BudgetExceeded, Price, Watchdog, guard
from clevagent.demo.results import Bill, SceneResult
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.money import PICO_PER_USD, to_pico

_MODEL = "gpt-4.1"
_PRICE = (2.00, 8.00)
"""US dollars for a million tokens of input and of output; given to both sides, so that no price list plays a part."""
_TRIES = 50
_TIMED_OUT_TRIES = 20
_UNPARSED = 39
"""After so many tries the script ends the agent that nobody guards; nothing else would."""

# A thousand tokens (the provider bills each byte as one) and a limit of a thousand: a call costs $0.002 + $0.008 = $0.01.
_PROMPT = ("Sum up what this customer has written to us over the years, in one friendly paragraph. " * 12)[:1000]
_CENT_CALL = {"max_tokens": 1000}
_SCANNED_LINE = "|w1dget, lrg . . . . . . . .|  4|  12,5O|....5O.0O?|  smudge: sprockeL, s  m|   1O|   3,1l|\n"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Work that costs more than it should."""

    title: str
    story: str
    """What happens in it, in a sentence."""
    ceiling: str
    """US dollars."""
    work: Callable[[BaseChatModel], None]
    """What is done with the model. Ends when the work is done or is refused."""
    replies: Sequence[Reply]
    tells_usage: bool
    """Whether the client gets to hear what each call used."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model."""
    billing: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the provider."""

    @property
    def ceiling_pico(self) -> int:
        """The ceiling in pico-USD."""
        return to_pico(self.ceiling, what="ceiling")


class Audience(Protocol):
    """Who is told how the demo gets on."""

    def scene_begins(self, number: int, scene: Scene) -> None:
        """Hear of a scene, counted from 1."""

    def act_begins(self, scene: Scene, provider: LoopbackProvider, *, is_guarded: bool) -> None:
        """Hear that a scene is played, without or with a guard; ``provider`` can be watched from now on."""

    def scene_ended(self, result: SceneResult) -> None:
        """Hear what a scene came to."""


def play(scenes: Sequence[Scene], audience: Audience, *, block: Sequence[str] = ()) -> list[SceneResult]:
    """Play every scene, with a watchdog of its own that leaves out the plugins in ``block``."""
    results = []
    for number, scene in enumerate(scenes, start=1):
        audience.scene_begins(number, scene)
        unguarded = _play_unguarded(scene, audience)
        results.append(_play_guarded(scene, audience, unguarded, block))
        audience.scene_ended(results[-1])
    return results


def _play_unguarded(scene: Scene, audience: Audience) -> Bill:
    with _provider(scene) as provider:
        audience.act_begins(scene, provider, is_guarded=False)
        scene.work(_model(scene, provider))
    return _bill(provider)


def _play_guarded(scene: Scene, audience: Audience, unguarded: Bill, block: Sequence[str]) -> SceneResult:
    watchdog = Watchdog(agent="demo", prices={_MODEL: Price(input=_PRICE[0], output=_PRICE[1])}, block=block)
    try:
        with _provider(scene) as provider:
            audience.act_begins(scene, provider, is_guarded=True)
            model = guard(_model(scene, provider), watchdog=watchdog)
            with watchdog.run(budgets=[Budget(usd=scene.ceiling)]) as run, suppress(BudgetExceeded):
                scene.work(model)
        summary = run.summary()
    finally:
        watchdog.shutdown()
    return SceneResult(
        title=scene.title,
        ceiling_pico=scene.ceiling_pico,
        tells_usage=scene.tells_usage,
        unguarded=unguarded,
        guarded=_bill(provider),
        # Amounts of a summary are floats, which keep every pico-USD up to $9 000.
        ledger_pico=sum(round(state.spent * PICO_PER_USD) for state in summary.budgets),
        refused=summary.refusals,
    )


def _provider(scene: Scene) -> LoopbackProvider:
    return LoopbackProvider(scene.replies, prices={_MODEL: _PRICE}, **scene.billing)


def _model(scene: Scene, provider: LoopbackProvider) -> BaseChatModel:
    arguments = {"model": _MODEL, "api_key": "demo", "base_url": provider.openai_url, "timeout": 30, **scene.model}
    return ChatOpenAI(**arguments)


def _bill(provider: LoopbackProvider) -> Bill:
    """Read the bill of a provider that is closed, so that nothing is still on its way."""
    return Bill(billed_pico=provider.billed_pico, requests=provider.request_count)


# -- the work of each scene -----------------------------------------------------------------------------------------------


def read_invoice(number: str) -> str:
    """Read an invoice from its scan."""
    return f"SCAN OF INVOICE {number}\n{_SCANNED_LINE * 12}TOTAL |......|....../ (page torn)\nconfidence 0.31"


def _parse_again(model: BaseChatModel) -> None:
    agent = create_agent(model, [read_invoice], system_prompt="You are an accountant. Find each invoice's total. Do not guess.")
    question = {"role": "user", "content": "What is the total of invoice 4711?"}
    agent.invoke({"messages": [question]}, {"recursion_limit": 10 * _UNPARSED})


def _fan_out(model: BaseChatModel) -> None:
    answers = model.batch([_PROMPT] * _TRIES, {"max_concurrency": _TRIES}, return_exceptions=True)
    _raise_unless(answers, BudgetExceeded)


def _break_off(model: BaseChatModel) -> None:
    for _ in range(_TRIES):
        with suppress(BudgetExceeded):
            for _chunk in model.stream(_PROMPT):
                break


def _time_out(model: BaseChatModel) -> None:
    answers = model.batch([_PROMPT] * _TIMED_OUT_TRIES, {"max_concurrency": _TIMED_OUT_TRIES}, return_exceptions=True)
    _raise_unless(answers, BudgetExceeded, APITimeoutError)


def _raise_unless(answers: Sequence[object], *expected: type[Exception]) -> None:
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, expected):
            raise answer


SCENES = (
    Scene(
        title="Re-parsing agent",
        story="The model cannot use what its tool answers, so it asks for the same again, each time with a longer history. "
        f"The script ends it after {_UNPARSED + 1} calls; nothing else would.",
        ceiling="0.10",
        work=_parse_again,
        replies=[Reply(text="", tool_calls=[("read_invoice", {"number": "4711"})])] * _UNPARSED
        + [Reply(text="I cannot find the total of this invoice.")],
        tells_usage=True,
        model={"max_tokens": 400},
        billing={"tokens_per_byte": 0.25, "output_share": 0.25},
    ),
    Scene(
        title="Fan-out of 50",
        story=f"{_TRIES} calls of $0.01 start at once, on {_TRIES} threads; the ceiling has room for 10.",
        ceiling="0.10",
        work=_fan_out,
        replies=[Reply(delay_s=0.25)],
        tells_usage=True,
        model=_CENT_CALL,
    ),
    Scene(
        title="Streams broken off",
        story=f"{_TRIES} answers of $0.01 are streamed, and the reader leaves each after its first words. All are billed in full.",
        ceiling="0.10",
        work=_break_off,
        replies=[Reply(text="Dear customer, thank you for the many letters.", chunks=8)],
        tells_usage=False,
        model=_CENT_CALL,
    ),
    Scene(
        title="Retries after timeouts",
        story=f"The provider is too slow for {_TIMED_OUT_TRIES} calls of $0.01. OpenAI's client gives up and sends each twice more, as it "
        "does by default; every request is billed.",
        ceiling="0.10",
        work=_time_out,
        replies=[Reply(hang=True)],
        tells_usage=False,
        model={**_CENT_CALL, "timeout": 0.5},
    ),
)
