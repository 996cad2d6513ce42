"""What a newcomer does first, done to the letter: README's install line, and its first example, in an environment that is empty."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INSTALL_S = 600.0
"""How long pip may take, which fetches what is not in its cache."""
RUN_S = 120.0
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def first(language: str) -> str:
    """README's first block in ``language``."""
    return next(code for found, code in BLOCK.findall(README) if found == language)


def run(command: list[str], **given) -> str:
    """Run a command that has to succeed, and give what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """What a shell has where nothing of ours and no key is set."""
    ours = re.compile(
        r"PYTHON|VIRTUAL_ENV|COV_|PYTEST|.*(_API_KEY|_BASE_URL|_API_BASE)$|(CLEVAGENT|OPENAI|ANTHROPIC|LANGCHAIN|LANGSMITH)_"
    )
    return {name: value for name, value in os.environ.items() if not ours.match(name)} | more


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], timeout=INSTALL_S)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory):
    """Make an empty environment with the wheel and one of its extras, and give its folder of programs."""

    def install(extra: str) -> Path:
        folder = tmp_path_factory.mktemp("empty") / "venv"
        venv.create(folder, with_pip=False)
        command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--prefer-binary"]
        command += ["--constraint", str(ROOT / "constraints.txt"), f"clevagent{extra} @ {wheel.as_uri()}"]
        run(command, timeout=INSTALL_S, env=environment(PIP_DISABLE_PIP_VERSION_CHECK="1"))
        return folder / "bin"

    return install


@pytest.mark.slow
def test_the_first_example_runs_right_after_the_install_line_and_prints_what_the_readme_shows(install, tmp_path):
    """No key, no proxy to a provider, nothing installed but the extra that the line names."""
    line = re.match(r'pip install "\.(\[[\w,]+\])"', first("sh"))
    assert line is not None, "README begins with how to install what its first example needs"
    programs = install(line[1])
    example = tmp_path / "example.py"
    example.write_text(first("python"))
    # What wants to leave this machine meets a proxy that is not there.
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9") | {"NO_PROXY": "127.0.0.1"}
    nowhere = proxies | {name.lower(): value for name, value in proxies.items()}
    printed = run([str(programs / "python"), str(example)], cwd=tmp_path, env=environment(**nowhere), timeout=RUN_S)
    assert printed == first("text")
    assert list(tmp_path.iterdir()) == [example]


@pytest.mark.slow
def test_the_core_alone_works_and_says_that_no_framework_is_installed(install, tmp_path):
    """``pip install .``, the command, and the interpreter's start with what ``clevagent.pth`` asks for."""
    programs = install("")
    call = (
        "import clevagent\nwith clevagent.tool_call('search', {}) as call:\n    call.settle(result='nothing')\nprint('settled')\n"
    )
    assert run([str(programs / "python"), "-c", call], cwd=tmp_path, env=environment(), timeout=RUN_S) == "settled\n"
    settings = environment(CLEVAGENT_AUTO_ATTACH="1", COLUMNS="200")
    listed = run([str(programs / "clevagent"), "plugins"], cwd=tmp_path, env=settings, timeout=RUN_S)
    assert re.findall(r"^(\w+) +clevagent +not installed ", listed, re.MULTILINE) == [
        "anthropic",
        "crewai",
        "langchain",
        "langgraph",
        "openai",
    ]
    assert listed == run([str(programs / "python"), "-m", "clevagent", "plugins"], cwd=tmp_path, env=settings, timeout=RUN_S)
    demo = subprocess.run(
        [str(programs / "clevagent"), "demo"], capture_output=True, text=True, check=False, env=settings, timeout=RUN_S
    )
    assert demo.returncode == 2
    assert 'pip install ".[demo]"' in demo.stderr
