"""What a scene is, and how it is played: without a guard, then guarded, each time against a provider that keeps a bill of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from langchain_openai import ChatOpenAI

from clevagent import Price
from clevagent.demo.results import Bill, GuardedAct, Means, SceneResult
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.money import to_pico

MODEL = "gpt-4.1"
_PRICE = (2.00, 8.00)
"""US dollars for a million tokens of input and of output; given to both sides, so that no price list plays a part."""
PRICES = {MODEL: Price(input=_PRICE[0], output=_PRICE[1])}
"""What the watchdogs are given."""

# A thousand tokens (the provider bills each byte as one) and a limit of a thousand: a call costs $0.002 + $0.008 = $0.01.
PROMPT = ("Sum up what this customer has written to us over the years, in one friendly paragraph. " * 12)[:1000]
CENT_CALL = {"max_tokens": 1000}


@dataclass(frozen=True, kw_only=True)
class Scene(ABC):
    """Work that costs more than it should."""

    title: str
    story: str
    """What happens in it, in a sentence."""
    ceiling: str
    """US dollars."""
    replies: Sequence[Reply]
    tells_usage: bool
    """Whether the client gets to hear what each call used."""
    billing: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the provider."""
    means: ClassVar[Means] = "ceiling"
    """What is to stop it."""

    @property
    def ceiling_pico(self) -> int:
        """The ceiling in pico-USD."""
        return to_pico(self.ceiling, what="ceiling")

    @abstractmethod
    def play_unguarded(self, provider: LoopbackProvider) -> None:
        """Do the work with nobody watching."""

    @abstractmethod
    def play_guarded(self, provider: LoopbackProvider, block: Sequence[str]) -> GuardedAct:
        """Do the same work under the ceiling, with watchdogs that leave out the plugins in ``block``."""


class Audience(Protocol):
    """Who is told how the demo gets on."""

    def scene_begins(self, number: int, scene: Scene) -> None:
        """Hear of a scene, counted from 1."""

    def act_begins(self, scene: Scene, provider: LoopbackProvider, *, is_guarded: bool) -> None:
        """Hear that a scene is played, without or with a guard; ``provider`` can be watched from now on."""

    def scene_ended(self, result: SceneResult) -> None:
        """Hear what a scene came to."""


def play(scenes: Sequence[Scene], audience: Audience, *, block: Sequence[str] = ()) -> list[SceneResult]:
    """Play every scene, with watchdogs of its own that leave out the plugins in ``block``."""
    results = []
    for number, scene in enumerate(scenes, start=1):
        audience.scene_begins(number, scene)
        with _provider(scene) as unguarded:
            audience.act_begins(scene, unguarded, is_guarded=False)
            scene.play_unguarded(unguarded)
        with _provider(scene) as guarded:
            audience.act_begins(scene, guarded, is_guarded=True)
            act = scene.play_guarded(guarded, block)
        # Of providers that are closed, so that nothing is still on its way.
        results.append(_result(scene, _bill(unguarded), _bill(guarded), act))
        audience.scene_ended(results[-1])
    return results


def chat_model(base_url: str, arguments: Mapping[str, Any]) -> ChatOpenAI:
    """Make OpenAI's real client of the provider at ``base_url``."""
    given = {"model": MODEL, "api_key": "demo", "base_url": base_url, "timeout": 30, **arguments}
    return ChatOpenAI(**given)


def _provider(scene: Scene) -> LoopbackProvider:
    return LoopbackProvider(scene.replies, prices={MODEL: _PRICE}, **scene.billing)


def _bill(provider: LoopbackProvider) -> Bill:
    return Bill(billed_pico=provider.billed_pico, requests=provider.request_count)


def _result(scene: Scene, unguarded: Bill, guarded: Bill, act: GuardedAct) -> SceneResult:
    return SceneResult(
        title=scene.title,
        ceiling_pico=scene.ceiling_pico,
        tells_usage=scene.tells_usage,
        means=scene.means,
        unguarded=unguarded,
        guarded=guarded,
        act=act,
    )
