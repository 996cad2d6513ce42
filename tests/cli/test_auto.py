"""``CLEVAGENT_AUTO_ATTACH=1``: a program that does not know of ClevAgent is guarded, because the interpreter reads ``clevagent.pth``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clevagent.testing import LoopbackProvider

PTH = Path(__file__).parents[2] / "clevagent.pth"
READ_PTH = "import site, sys, runpy; site.addsitedir(sys.argv.pop(1)); runpy.run_path(sys.argv[1], run_name='__main__')"
"""As the interpreter does when it starts, where the package is installed."""

PROGRAM = """
import os, sys
from langchain_openai import ChatOpenAI

assert "clevagent_langchain.handler" not in sys.modules
model = ChatOpenAI(model="gpt-4o", api_key="test", base_url=os.environ["PROVIDER"], max_tokens=9, max_retries=0)
for _ in range(3):
    try:
        print(model.invoke("Hello").content)
    except RuntimeError as refusal:
        print(type(refusal).__name__)
"""
LOADED = """
import sys
print(sorted({name.partition(".")[0] for name in sys.modules} & {"clevagent", "langchain_core", "openai", "anthropic", "crewai"}))
"""


@pytest.fixture
def start(tmp_path):
    """Start a program in a process of its own, with these variables."""
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(PTH, folder)
    path = tmp_path / "agent.py"

    def start(program, **environment):
        path.write_text(program)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("CLEVAGENT_")}
        return subprocess.run(
            [sys.executable, "-S", "-c", READ_PTH, str(folder), str(path)],
            env=plain | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return start


@pytest.mark.slow
def test_a_program_without_a_word_of_clevagent_is_stopped(start):
    with LoopbackProvider() as provider:
        done = start(PROGRAM, PROVIDER=provider.openai_url, CLEVAGENT_AUTO_ATTACH="1", CLEVAGENT_BUDGETS="llm_calls=2 per=lifetime")
        assert done.stdout.split() == ["ok", "ok", "BudgetExceeded"], done.stderr
        assert provider.request_count == 2


@pytest.mark.parametrize("flag", [{}, {"CLEVAGENT_AUTO_ATTACH": ""}])
def test_without_the_variable_nothing_of_clevagent_is_imported(start, flag):
    assert start(LOADED, **flag).stdout == "[]\n"


@pytest.mark.slow
def test_the_variable_can_say_no(start):
    done = start(
        LOADED + "print('clevagent_core.watchdog' in sys.modules, __import__('clevagent_core.default').default._watchdog)",
        CLEVAGENT_AUTO_ATTACH="0",
    )
    assert done.stdout.endswith(" None\n"), done.stderr


@pytest.mark.slow
def test_no_framework_is_imported_before_the_program_does(start):
    done = start(LOADED, CLEVAGENT_AUTO_ATTACH="1")
    assert (done.stdout, done.stderr) == ("['clevagent']\n", "")


@pytest.mark.slow
def test_a_program_is_not_started_without_the_ceilings_that_were_asked_for(start):
    done = start("print('started')", CLEVAGENT_AUTO_ATTACH="1", CLEVAGENT_BUDGETS="euro=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ClevAgent could not start, so the program was not started either")
    assert "euro=5" in done.stderr
    assert "Traceback" not in done.stderr


FRAMEWORKS = """
import sys
import {module}
from clevagent_core import default
from langchain_core.language_models.fake_chat_models import FakeListChatModel

print([incident.kind for incident in default.current().recent])
try:
    for _ in range(2):
        FakeListChatModel(responses=["ok"]).invoke("Hello")
except RuntimeError as refusal:
    print(type(refusal).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["langchain_core.callbacks.manager", "langgraph.graph", "langchain.agents"])
def test_whatever_is_imported_first_is_attached_to_without_a_false_alarm(start, module):
    """Attaching to LangGraph attaches to LangChain, whose import is being waited for, too."""
    done = start(FRAMEWORKS.format(module=module), CLEVAGENT_AUTO_ATTACH="1", CLEVAGENT_BUDGETS="llm_calls=1 per=lifetime")
    assert done.stdout.splitlines() == ["[]", "BudgetExceeded"], done.stderr
    assert "could not attach" not in done.stderr
