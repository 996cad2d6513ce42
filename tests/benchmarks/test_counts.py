"""What a call costs in blocks of memory. Counts, not times: they come out the same on a busy machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage

import clevagent
from clevagent import Budget, Run, Usage, Watchdog
from clevagent.integrations.langchain import ClevAgentCallbackHandler
from clevagent_core.calls import LLMCall

MARGIN = 1.15
"""How much more than was measured another release of LangChain or of CPython may take without being our regression."""
HANDLER_BLOCKS = 116
GUARD_BLOCKS = 105
"""Above a handler that does nothing, as measured with CPython 3.11 and langchain-core 1.7, every built-in guard on.

CPython 3.12 and 3.13 take 8 fewer and 2 more.
"""
CORE_BLOCKS = 62
"""One call under three budgets, without a framework."""
REPEATS = 3
"""Looking at the allocator before each instruction is slow; the counts differ by a block or two at most."""
WARM_UP = 1500
"""Windows and caches are full after that many calls."""
STRAY_BLOCKS = 100
"""What a table that grows now and then, or somebody's cache, may keep: far below one block a call."""
BIG_USD = 1_000_000


class NoOp(BaseCallbackHandler):
    raise_error = True
    run_inline = True

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        pass


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the repository and in no wheel."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def counting() -> ModuleType:
    from benchmarks import counting

    return counting


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    with watchdog.run(budgets=[Budget(usd=BIG_USD)]):
        yield watchdog


@pytest.fixture
def model() -> Any:
    from benchmarks.peers.ways import instant_model

    return instant_model()


@pytest.fixture
def run() -> Iterator[Run]:
    run = Watchdog().start_run(
        budgets=[Budget(usd=BIG_USD), Budget(usd=BIG_USD, per="day"), Budget(usd=BIG_USD, per="month", by="tenant")],
        tags={"tenant": "acme"},
    )
    yield run
    run.end()


def invoking(model: Any, *handlers: BaseCallbackHandler) -> Callable[[], object]:
    messages = [HumanMessage("x" * 200)]
    config: Any = {"callbacks": list(handlers)} if handlers else None
    return lambda: model.invoke(messages, config)


def one_core_call(run: Run) -> Callable[[], object]:
    call, usage = LLMCall(model="gpt-4o", input=["x" * 200], max_output_tokens=100), Usage(input_tokens=200, output_tokens=100)
    return lambda: run.open(call).settle(usage)


def taken(counting: ModuleType, function: Callable[[], object]) -> int:
    """The blocks that a call takes: the least of three counts, since other threads of the process take some, too."""
    return min(counting.blocks_taken(function, repeats=REPEATS) for _ in range(3))


def test_the_counter_counts_what_is_taken_even_if_it_is_given_back(counting: ModuleType) -> None:
    """A hundred objects, none of which stays, are a hundred blocks."""

    def hundred() -> None:
        for _ in range(100):
            object()

    floor = taken(counting, lambda: None)
    assert taken(counting, hundred) - floor == pytest.approx(100, abs=3)
    # Other threads of the process may end meanwhile.
    assert min(abs(counting.blocks_left(hundred, 100)) for _ in range(3)) < 10


def test_the_counter_leaves_out_what_the_interpreter_takes_for_it(counting: ModuleType) -> None:
    """CPython 3.12 and later make a number for each instruction that they trace, and a block for each number above 256."""
    namespace: dict[str, Any] = {}
    exec("def long():\n" + "    a = 1\n" * 500, namespace)
    floor = taken(counting, lambda: None)
    assert taken(counting, namespace["long"]) == pytest.approx(floor, abs=3)


def test_what_stays_is_counted(counting: ModuleType) -> None:
    """A call that keeps an object each time is found out."""
    kept: list[object] = []
    assert max(counting.blocks_left(lambda: kept.append(object()), 1000) for _ in range(3)) >= 1000


def test_the_handler_takes_no_more_blocks_than_measured(counting: ModuleType, watchdog: Watchdog, model: Any) -> None:
    """Above a handler that does nothing; anything that copies or rescans messages is many times dearer."""
    floor = taken(counting, invoking(model, NoOp()))
    ours = taken(counting, invoking(model, ClevAgentCallbackHandler(watchdog=watchdog)))
    assert ours - floor <= HANDLER_BLOCKS * MARGIN


def test_a_guarded_model_takes_no_more_blocks_than_measured(counting: ModuleType, watchdog: Watchdog, model: Any) -> None:
    """Above a handler that does nothing on the bare model."""
    floor = taken(counting, invoking(model, NoOp()))
    ours = taken(counting, invoking(clevagent.guard(model, watchdog=watchdog)))
    assert ours - floor <= GUARD_BLOCKS * MARGIN


def test_the_core_takes_no_more_blocks_than_measured(counting: ModuleType, run: Run) -> None:
    """Check, reserve and settle under three budgets."""
    assert taken(counting, one_core_call(run)) <= CORE_BLOCKS * MARGIN


def test_no_block_stays_after_ten_thousand_calls_of_the_core(counting: ModuleType, run: Run) -> None:
    """Nothing is kept for each call, under three budgets of which one has a key."""
    assert counting.blocks_left(one_core_call(run), 10_000, warm_up=WARM_UP) <= STRAY_BLOCKS


@pytest.mark.parametrize("way", ["handler", "guard"])
def test_no_block_stays_after_two_thousand_invokes(counting: ModuleType, watchdog: Watchdog, model: Any, way: str) -> None:
    """Nothing is kept for each call that ended, in either way into LangChain."""
    if way == "handler":
        call = invoking(model, ClevAgentCallbackHandler(watchdog=watchdog))
    else:
        call = invoking(clevagent.guard(model, watchdog=watchdog))
    assert counting.blocks_left(call, 2000, warm_up=WARM_UP) <= STRAY_BLOCKS
