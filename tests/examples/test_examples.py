"""Each example runs as it stands, offline, and prints what a reader should see."""

from __future__ import annotations

import gc
import os
import re
import runpy
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from inline_snapshot import snapshot

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "offline")
CREWAI = {"research_crew", "shared_budget"}
"""Those that need CrewAI, which is in an environment of its own."""


@pytest.fixture
def play(monkeypatch, capsys):
    """Run an example; give what it printed, without what differs each time."""

    def play(name):
        if name in CREWAI and find_spec("crewai") is None:
            pytest.skip("CrewAI is not in this environment; `make test-crewai` runs this")
        for variable in [name for name in os.environ if name.endswith(("_API_KEY", "_BASE_URL"))]:
            monkeypatch.delenv(variable)
        monkeypatch.syspath_prepend(str(FOLDER))
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        finally:
            sys.modules.pop("offline", None)
        # An example leaves its clients to the end of its process: here, and not to the collector in the middle of another test.
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()
        printed = re.sub(r"\b[0-9a-f]{32}\b", "RUN-ID", capsys.readouterr().out)
        # What refusals say is read in tests/core/test_messages.py; what was spent is in the table below.
        printed = re.sub(r"^(Stopped: .* was (refused|not started)\b|.* The graph asks:).*", r"\1 ...", printed, flags=re.MULTILINE)
        return re.sub(r"started .*, ended after .* s", "started THEN, ended after A WHILE", printed)

    return play


def test_every_example_has_a_test():
    tests = Path(__file__).read_text()
    assert [name for name in EXAMPLES if f'play("{name}")' not in tests] == []


def test_every_example_is_in_the_readme():
    readme = (FOLDER.parent / "README.md").read_text()
    assert [name for name in EXAMPLES if f"examples/{name}.py" not in readme] == []


@pytest.mark.slow
def test_heartbeat_loops(play):
    assert play("heartbeat_loops") == snapshot("""\
collector: 3 steps, 0 tokens, $0.0000, ended by a shutdown
writer: 3 steps, 3600 tokens, $0.0108, ended by a shutdown
listener: 3 steps, 0 tokens, $0.0000, ended by a shutdown
""")


@pytest.mark.slow
def test_zombie(play):
    assert play("zombie") == snapshot("""\
stall: nothing has moved in 'fetch'; stuck in fetch()
health check: ok
""")


@pytest.mark.slow
def test_react_agent(play):
    assert play("react_agent") == snapshot("""\
The agent says: The documents that I searched say nothing about shipments from Lyon.
run RUN-ID of 'warehouse', started THEN, ended after A WHILE
  spent $0.0009679 in 9 model calls (5,413 tokens in, 260 out) and 8 tool calls
  refused 1, clamped 0, charged at their upper bound 0, without a price 0
  model  gpt-4o-mini                      9 calls      $0.0009679      5,413 in       260 out
  node   model                            9 calls      $0.0009679      5,413 in       260 out
  tool   search                           8 calls           $0.00          0 in         0 out
The provider received 9 requests and billed $0.000968.
""")


@pytest.mark.slow
def test_agent_executor(play):
    assert play("agent_executor") == snapshot("""\
Stopped: A call of the tool 'temperature' was refused ...
Known so far: Lyon, Turin, Graz
run RUN-ID of 'weather', started THEN, ended after A WHILE
  spent $0.000237 in 4 model calls (1,260 tokens in, 80 out) and 3 tool calls
  refused 1, clamped 0, charged at their upper bound 0, without a price 0
  model  gpt-4o-mini                      4 calls       $0.000237      1,260 in        80 out
  tool   temperature                      3 calls           $0.00          0 in         0 out
  budget '3 tool_calls per run' (tool_calls): 3 of 3 spent, 0 held, stopped
The provider received 4 requests and billed $0.000237.
""")


@pytest.mark.slow
def test_own_plugin(play):
    assert play("own_plugin") == snapshot("""\
diary: 1 calls, $0.0030, 0 refused
Stopped: It is 0:00, and models are called from 6:00 to 22:00 only. Try again in the morning.
diary: 0 calls, $0.0000, 1 refused
""")


@pytest.mark.slow
def test_two_node_graph(play):
    assert play("two_node_graph") == snapshot("""\
Stopped: The node 'write' was not started ...
Reached: {'topic': 'loops', 'draft': 'Loops are hard to see from inside.', 'round': 3}
run RUN-ID of 'essay', started THEN, ended after A WHILE
  spent $0.0000846 in 6 model calls (276 tokens in, 72 out) and 0 tool calls
  refused 1, clamped 0, charged at their upper bound 0, without a price 0
  model  gpt-4o-mini                      6 calls      $0.0000846        276 in        72 out
  node   review                           3 calls     $0.00004995        189 in        36 out
  node   write                            3 calls     $0.00003465         87 in        36 out
  budget '3 llm_calls per run in node write' (llm_calls): 3 of 3 spent, 0 held
The provider received 6 requests and billed $0.000085.
""")


@pytest.mark.slow
def test_graph_that_asks(play):
    assert play("graph_that_asks") == snapshot("""\
3 chapters. The graph asks: ...
Done: 6 chapters.
The provider received 6 requests and billed $0.000376.
""")


@pytest.mark.slow
def test_raw_client(play):
    assert play("raw_client") == snapshot("""\
Stopped: A model call to 'gpt-4o-mini' was refused ...
11 ideas.
run RUN-ID of 'brainstorm', started THEN, ended after A WHILE
  spent $0.0008217 in 11 model calls (2,838 tokens in, 660 out) and 0 tool calls
  refused 1, clamped 0, charged at their upper bound 0, without a price 0
  model  gpt-4o-mini                     11 calls      $0.0008217      2,838 in       660 out
  budget '$0.001 per run' (usd): $0.0008217 of $0.001 spent, $0.00 held, stopped
The provider received 11 requests and billed $0.000822.
""")


def test_research_crew(play):
    assert play("research_crew") == snapshot("""\
The crew says: Watchdogs work best inside.
run RUN-ID of 'research-crew', started THEN, ended after A WHILE
  spent $0.0001467 in 2 model calls (658 tokens in, 80 out) and 0 tool calls
  refused 0, clamped 0, charged at their upper bound 0, without a price 0
  model  gpt-4o-mini                      2 calls      $0.0001467        658 in        80 out
  node   Writer                           1 calls      $0.0000798        372 in        40 out
  node   Researcher                       1 calls      $0.0000669        286 in        40 out
The provider received 2 requests and billed $0.000147.
""")


def test_shared_budget(play):
    assert play("shared_budget") == snapshot("""\
agent: done
crew: done
graph: stopped, 2 of 2 calls are used up
run RUN-ID of 'three-in-one', started THEN, ended after A WHILE
  spent $0.0001591 in 2 model calls (261 tokens in, 200 out) and 0 tool calls
  refused 1, clamped 0, charged at their upper bound 0, without a price 0
  model  gpt-4o-mini                      2 calls      $0.0001591        261 in       200 out
  node   Clerk                            1 calls      $0.0000978        252 in       100 out
  node   model                            1 calls     $0.00006135          9 in       100 out
  budget 'all three' (llm_calls): 2 of 2 spent, 0 held, stopped
The provider received 2 requests and billed $0.000159.
""")
