"""Errors: their tree, their fields, and words that they must not contain."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest

import clevagent
from clevagent import (
    Budget,
    BudgetBusy,
    BudgetExceeded,
    ClevAgentError,
    Incident,
    PluginError,
    Stopped,
    UsageError,
)
from clevagent_core import errors

ROOT = Path(clevagent.__file__).parents[1]
SOURCES = sorted(
    path for package in ("clevagent", "clevagent_core", "clevagent_langchain") for path in (ROOT / package).rglob("*.py")
)

INCIDENT = Incident(
    kind="budget",
    message="It was refused.",
    agent="research",
    run_id="r1",
    at=1.5,
    action="raise",
    budget="daily",
    key="tenant=a",
    window="2026-01-01",
    unit="usd",
    spent=0.5,
    held=0.25,
    needed=0.75,
    ceiling=1.0,
    details={"why": "because"},
)


def subclasses(kind):
    return {kind, *(found for child in kind.__subclasses__() for found in subclasses(child))}


STOPPED = sorted((kind for kind in subclasses(Stopped) if kind.__module__ == errors.__name__), key=lambda kind: kind.__name__)


def test_the_tree_of_errors():
    assert {
        kind.__name__: [base.__name__ for base in kind.__bases__] for kind in vars(errors).values() if isinstance(kind, type)
    } == {
        "ClevAgentError": ["Exception"],
        "Stopped": ["ClevAgentError", "RuntimeError"],
        "BudgetExceeded": ["Stopped"],
        "BudgetBusy": ["BudgetExceeded"],
        "LoopDetected": ["Stopped"],
        "RemoteStop": ["Stopped"],
        "DeliveryError": ["ClevAgentError"],
        "LedgerError": ["ClevAgentError"],
        "UsageError": ["ClevAgentError"],
        "PluginError": ["ClevAgentError"],
    }


@pytest.mark.parametrize("kind", [Stopped, BudgetExceeded, BudgetBusy])
def test_a_stop_is_a_runtime_error(kind):
    assert issubclass(kind, RuntimeError)


@pytest.mark.parametrize("kind", [UsageError, PluginError])
def test_a_mistake_is_no_stop(kind):
    assert issubclass(kind, ClevAgentError)
    assert not issubclass(kind, Stopped)


@pytest.mark.parametrize("kind", STOPPED)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_stop_survives_pickling_with_all_its_fields(kind, protocol):
    back = pickle.loads(pickle.dumps(kind(INCIDENT), protocol))  # noqa: S301 - our own
    assert (type(back), str(back), back.incident, back.run_id) == (kind, "It was refused.", INCIDENT, "r1")


@pytest.mark.parametrize("kind", STOPPED)
def test_a_stop_survives_copying(kind):
    assert copy.copy(kind(INCIDENT)).incident == copy.deepcopy(kind(INCIDENT)).incident == INCIDENT


@pytest.mark.parametrize("kind", [BudgetExceeded, BudgetBusy])
def test_a_budgets_stop_tells_its_numbers(kind):
    error = kind(INCIDENT)
    assert (error.budget, error.spent, error.held, error.needed, error.ceiling) == ("daily", 0.5, 0.25, 0.75, 1.0)


def test_a_real_refusal_tells_its_numbers_and_survives_pickling(make, llm):
    with make(agent="research").run(budgets=[Budget(usd=0.10, name="small")]) as run:
        run.open(llm(4))
        run.open(llm(2)).settle(clevagent.Usage(output_tokens=2))
        with pytest.raises(BudgetExceeded) as caught:
            run.open(llm(9))
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (error.budget, error.spent, error.held, error.needed, error.ceiling) == ("small", 0.02, 0.04, 0.09, 0.1)
    assert (error.run_id, error.incident.agent, error.incident.unit, error.incident.action) == (
        run.run_id,
        "research",
        "usd",
        "raise",
    )


@pytest.mark.parametrize("kind", [UsageError, PluginError])
def test_a_mistake_survives_pickling(kind):
    back = pickle.loads(pickle.dumps(kind("what happened")))  # noqa: S301 - our own
    assert (type(back), str(back)) == (kind, "what happened")


def literals(path):
    """The texts of a module, docstrings left out; those of f-strings piece by piece, and joined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


# The loopback provider speaks as a provider does.
@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "testing" not in path.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_message_has_the_words_by_which_frameworks_know_a_providers_errors(path):
    found = [text for text in literals(path) for word in ("rate limit", "context length") if word in text.lower()]
    assert found == []


def test_the_sources_were_found():
    assert len(SOURCES) > 20
