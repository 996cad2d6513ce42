"""One of the demo's five processes: tries its calls, alone or on the ceiling that it shares with the others.

It is told what to do in its argument (:class:`Orders` as JSON), says ``ready`` on its output, begins when it is given a byte,
and at the end says how many of its calls were refused. Where its input ends, nobody waits for it any more, and so it ends too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_core.language_models.chat_models import BaseChatModel

from clevagent import Budget, BudgetExceeded, Watchdog, guard
from clevagent.demo.acting import CENT_CALL, PRICES, PROMPT, chat_model
from clevagent.demo.surroundings import kept_log

READY = "ready"
BUDGET = "shared"
_INPUT = 0
_ABANDONED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a worker is to do."""

    base_url: str
    """The provider's address."""
    tries: int
    ceiling: str
    """US dollars."""
    ledger: str | None
    """The file in which the ceiling is kept; ``None`` without a guard."""
    block: Sequence[str]
    """The plugins that its watchdog leaves out."""


def main() -> None:
    """Work."""
    orders = Orders(**json.loads(sys.argv[1]))
    with kept_log():
        model: BaseChatModel = chat_model(orders.base_url, CENT_CALL)
        if orders.ledger is None:
            refused = _work(model, orders.tries)
        else:
            budget = Budget(usd=orders.ceiling, per="lifetime", name=BUDGET)
            watchdog = Watchdog(agent="demo", prices=PRICES, budgets=[budget], ledger=orders.ledger, block=orders.block)
            try:
                refused = _work(guard(model, watchdog=watchdog), orders.tries)
            finally:
                watchdog.shutdown()
    _say(str(refused))


def _work(model: BaseChatModel, tries: int) -> int:
    """Make every call, one after another; count those that are refused."""
    _say(READY)
    if not os.read(_INPUT, 1):
        os._exit(_ABANDONED)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    refused = 0
    for _ in range(tries):
        try:
            model.invoke(PROMPT)
        except BudgetExceeded:
            refused += 1
    return refused


def _end_with_the_parent() -> None:
    # Not sys.stdin, whose lock the interpreter wants back when it ends.
    os.read(_INPUT, 1)
    os._exit(_ABANDONED)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - it speaks through its output


if __name__ == "__main__":
    main()
