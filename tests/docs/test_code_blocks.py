"""Every code block of the README and of docs/ is run, offline, as a reader would run it."""

from __future__ import annotations

import gc
import importlib.util
import re
import signal
import tomllib
import warnings
from pathlib import Path

import pytest

import clevagent
from clevagent.testing import LoopbackProvider

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


@pytest.fixture
def own_signals():
    """What a page does about SIGTERM is over with it: whatever forks later would inherit that."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_the_page_shows(page, monkeypatch, tmp_path, capsys):
    """The blocks of a page share one namespace, like a reader's session; models talk to a provider on this machine.

    A block of text right behind one of Python is what it prints.
    """
    if re.search(r"^(from|import) crewai\b", page.read_text(), re.MULTILINE) and importlib.util.find_spec("crewai") is None:
        pytest.skip("CrewAI is not in this environment; `make test-crewai` runs this")
    monkeypatch.chdir(tmp_path)
    with LoopbackProvider() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", "test")
        monkeypatch.setenv("OPENAI_BASE_URL", provider.openai_url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", "test")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", provider.anthropic_url)
        namespace = {"__name__": "__main__"}
        found = BLOCK.findall(page.read_text())
        for number, (language, code) in enumerate(found, 1):
            if language != "python":
                continue
            # A page shows several ways to start: each init stands for a program of its own.
            if re.search(r"^clevagent\.init\(", code, re.MULTILINE):
                clevagent.shutdown()
            capsys.readouterr()
            exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
            if number < len(found) and found[number][0] == "text":
                assert capsys.readouterr().out == found[number][1], f"block {number}"
    # A page leaves its clients to the collector, as a session does: here, and not in the middle of another test.
    namespace.clear()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


def test_shell_blocks_name_what_exists():
    """Targets of make, extras of pip, and commands of clevagent in shell blocks are real."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from clevagent.cli import main

    lines = [line for page in PAGES for code in blocks(page, "sh") for line in code.splitlines()]
    assert lines
    for line in lines:
        command = line.partition("#")[0].split()
        if not command:
            continue
        if command[0] == "make":
            assert command[1] in targets, line
        elif command[:2] == ["pip", "install"]:
            where = re.fullmatch(r'"\.\[([\w,]+)\]"|\.', command[2])
            assert where is not None, f"nobody is sent to a package index: {line}"
            assert set((where[1] or "all").split(",")) <= project["optional-dependencies"].keys(), line
        else:
            assert command[0] == "clevagent", line
            assert command[1] in main.commands, line


def test_nobody_is_sent_to_the_retired_package_on_the_index():
    """`pip install clevagent` would install something else."""
    for page in (*PAGES, *(ROOT / "examples").glob("*.py")):
        assert not re.search(r"pip install (-U )?[\"']?clevagent", page.read_text()), page


def test_links_between_pages_lead_somewhere():
    """A relative link names a file of this repository."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
