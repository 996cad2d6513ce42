"""The command ``clevagent``: through its own door, with plugins and results made here."""

import logging
import os
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

import clevagent
from clevagent.cli import main
from clevagent_core.plugins import BUILTINS

OWN_ADAPTERS = [point for point in metadata.distribution("clevagent").entry_points if point.group == "clevagent"]


@pytest.fixture
def invoke(monkeypatch):
    """Run the command in this process, with no settings of ours around it."""
    for name in [name for name in os.environ if name.startswith("CLEVAGENT_")]:
        monkeypatch.delenv(name)

    def invoke(*arguments, **environment):
        return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "100", **environment})

    return invoke


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, module, source):
        folder = tmp_path / f"{name}_dist-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[clevagent]\n{name} = {module}:Plugin\n")
        (tmp_path / f"{module}.py").write_text(source)

    yield install
    for module in ("cli_test_good", "cli_test_bad"):
        sys.modules.pop(module, None)


GOOD = """
from clevagent import hookimpl

class Plugin:
    @hookimpl
    def clevagent_run_ended(self, run, summary):
        pass
"""
WAITS = """
from clevagent import hookimpl

class Plugin:
    @hookimpl
    def clevagent_attachable(self):
        return {"robots": "robot_framework_of_nobody"}
"""
BAD = "raise RuntimeError('[bold]no engine[/bold]')"


def row_of(output, name):
    (row,) = [line for line in output.splitlines() if line.split()[:1] == [name]]
    return row.split()


# -- clevagent, --version, --help -----------------------------------------------------------------------------------------


def test_version_is_printed(invoke):
    assert invoke("--version").output == f"clevagent {clevagent.__version__}\n"


@pytest.mark.slow
def test_python_m_clevagent_is_the_command():
    """Also where the folder of scripts is not on the path; its help says how it was called."""
    command = [sys.executable, "-m", "clevagent"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"clevagent {clevagent.__version__}\n", "")
    done = subprocess.run([*command, "plugins", "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("Usage: python -m clevagent plugins [OPTIONS]\n")


def test_help_lists_the_commands(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    assert "plugins" in result.output
    assert "demo" in result.output


@pytest.mark.slow
def test_help_imports_neither_the_demo_nor_a_framework_nor_rich():
    """``--help`` stays quick: what a command needs is imported when it runs."""
    code = (
        "import sys; from clevagent.cli import main; main(['--help'], standalone_mode=False); "
        "print([name for name in ('rich', 'langchain_core', 'openai', 'httpx', 'clevagent.demo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


# -- clevagent plugins ----------------------------------------------------------------------------------------------------


def test_plugins_lists_the_builtins_and_the_adapter_as_loaded(invoke):
    result = invoke("plugins")
    assert result.exit_code == 0
    for name in BUILTINS:
        assert row_of(result.output, name)[1:3] == ["built-in", "loaded"]
    assert row_of(result.output, "langchain")[1:3] == ["clevagent", "loaded"]


def test_plugins_shows_somebody_elses_plugin_with_its_distribution_and_hooks(invoke, install):
    install("alarm", "cli_test_good", GOOD)
    result = invoke("plugins")
    assert result.exit_code == 0
    assert row_of(result.output, "alarm") == ["alarm", "alarm-dist", "loaded", "clevagent_run_ended"]


def test_plugins_shows_what_is_blocked_in_the_environment(invoke, install):
    """A blocked plugin is not imported, so that blocking it also helps when it is broken."""
    install("engine", "cli_test_bad", BAD)
    result = invoke("plugins", CLEVAGENT_BLOCK="engine clevagent_core.price_list")
    assert result.exit_code == 0
    assert row_of(result.output, "engine")[1:] == ["engine-dist", "blocked"]
    assert row_of(result.output, "clevagent_core.price_list")[1:] == ["built-in", "blocked"]
    assert "cli_test_bad" not in sys.modules


def test_a_broken_plugin_is_told_with_its_reason_and_makes_the_exit_code_1(invoke, install, caplog):
    """The reason is shown as it is, not as markup, and not a second time in the log."""
    install("engine", "cli_test_bad", BAD)
    result = invoke("plugins")
    assert result.exit_code == 1
    assert " ".join(row_of(result.output, "engine")) == "engine engine-dist broken RuntimeError: [bold]no engine[/bold]"
    assert f"1 of {len(BUILTINS) + 1 + len(OWN_ADAPTERS)} plugins is broken" in result.output
    assert caplog.records == []
    assert not logging.getLogger("clevagent").disabled


def test_plugins_with_a_wrong_setting_says_so_and_has_the_exit_code_2(invoke):
    result = invoke("plugins", CLEVAGENT_BLOCK="no_such_plugin")
    assert result.exit_code == 2
    assert "no_such_plugin" in result.output
    assert "Traceback" not in result.output


FRAMEWORKS = {
    "anthropic": "anthropic",
    "crewai": "crewai",
    "langchain": "langchain_core",
    "langgraph": "langgraph",
    "openai": "openai",
}
"""What each adapter of ours needs."""


@pytest.fixture
def uninstall(monkeypatch):
    """Let a package be found no more, as if it were not installed."""

    def uninstall(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return uninstall


@pytest.mark.parametrize("name", sorted(FRAMEWORKS))
def test_plugins_says_which_framework_is_not_installed_and_how_to_install_it(invoke, uninstall, name):
    for package in FRAMEWORKS.values():
        uninstall(package)
    result = invoke("plugins", COLUMNS="200")
    assert result.exit_code == 0
    expected = f"{name} clevagent not installed needs {FRAMEWORKS[name]}, which the extra clevagent[{name}] adds"
    assert " ".join(row_of(result.output, name)) == expected
    assert 'pip install ".[anthropic,crewai,langchain,langgraph,openai]"' in result.output


@pytest.mark.slow
def test_plugins_imports_no_framework():
    code = (
        "import sys; from clevagent.cli import main; main(['plugins'], standalone_mode=False); "
        f"print([name for name in {list(FRAMEWORKS.values())!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_plugins_says_nothing_of_installing_where_nothing_is_missing(invoke, uninstall):
    uninstall("crewai")
    others = " ".join(name for name in FRAMEWORKS if name != "crewai")
    assert 'pip install ".[crewai]"' in invoke("plugins").output
    assert "pip install" not in invoke("plugins", CLEVAGENT_BLOCK="crewai").output
    assert row_of(invoke("plugins", CLEVAGENT_BLOCK=others).output, "crewai")[2:4] == ["not", "installed"]


@pytest.mark.slow
def test_the_plugin_of_somebody_elses_framework_waits_for_it_too(invoke, install, tmp_path):
    """By the same hook; its extra is named where it has one."""
    install("robots", "cli_test_good", WAITS)
    expected = "robots robots-dist not installed needs robot_framework_of_nobody"
    assert " ".join(row_of(invoke("plugins", COLUMNS="200").output, "robots")) == expected
    with (tmp_path / "robots_dist-1.0.dist-info" / "METADATA").open("a") as metadata:
        metadata.write("Provides-Extra: robots\n")
    result = invoke("plugins", COLUMNS="200")
    assert " ".join(row_of(result.output, "robots")) == f"{expected}, which the extra robots-dist[robots] adds"
    assert 'robots]"' not in result.output  # our repository does not have it
    (tmp_path / "robot_framework_of_nobody.py").write_text("raise AssertionError('imported')")
    assert row_of(invoke("plugins", COLUMNS="200").output, "robots")[2] == "loaded"


def test_plugins_fits_80_columns(invoke, uninstall):
    uninstall("crewai")
    output = invoke("plugins", COLUMNS="80").output
    assert max(map(len, output.splitlines())) <= 80
    assert "needs crewai, which the extra clevagent[crewai] adds" in " ".join(
        line[-24:].strip() for line in output.splitlines() if line[:1] in {"c", " "}
    )
