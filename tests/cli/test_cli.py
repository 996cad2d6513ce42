"""The command ``clevagent``: through its own door, with plugins and results made here."""

import io
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from rich.console import Console

import clevagent
from clevagent import cli
from clevagent.cli import main
from clevagent.demo.results import Bill, SceneResult, exit_code
from clevagent_core import default
from clevagent_core.plugins import BUILTINS

CENT = 10**10

FOREIGN_SETTINGS = {
    "CLEVAGENT_BUDGETS": "llm_calls=1 per=lifetime",
    "CLEVAGENT_DRY_RUN": "1",
    "CLEVAGENT_NONSENSE": "1",
    "LANGSMITH_TRACING": "true",
    "LANGSMITH_ENDPOINT": "http://127.0.0.1:9",
    "LANGSMITH_API_KEY": "none",
    "OPENAI_BASE_URL": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
}
"""What a user's shell may hold: with any of it the demo would end differently, or send something away."""


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
BAD = "raise RuntimeError('[bold]no engine[/bold]')"


def row_of(output, name):
    (row,) = [line for line in output.splitlines() if line.split()[:1] == [name]]
    return row.split()


# -- clevagent, --version, --help -----------------------------------------------------------------------------------------


def test_version_is_printed(invoke):
    assert invoke("--version").output == f"clevagent {clevagent.__version__}\n"


def test_help_lists_the_commands(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    assert "plugins" in result.output
    assert "demo" in result.output


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
    assert f"1 of {len(BUILTINS) + 2} plugins is broken" in result.output
    assert caplog.records == []
    assert not logging.getLogger("clevagent").disabled


def test_plugins_with_a_wrong_setting_says_so_and_has_the_exit_code_2(invoke):
    result = invoke("plugins", CLEVAGENT_BLOCK="no_such_plugin")
    assert result.exit_code == 2
    assert "no_such_plugin" in result.output
    assert "Traceback" not in result.output


def test_plugins_fits_80_columns(invoke):
    assert max(map(len, invoke("plugins", COLUMNS="80").output.splitlines())) <= 80


# -- clevagent demo: when it cannot run -----------------------------------------------------------------------------------


def test_without_its_extra_the_demo_says_what_is_missing_and_how_to_get_it(invoke, monkeypatch):
    """The name on the public index belongs to another package: it is never suggested."""
    monkeypatch.setitem(sys.modules, "langchain_openai", None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert "langchain_openai" in result.output
    assert "langchain_core" not in result.output
    assert 'pip install ".[demo]"' in result.output
    assert "pip install clevagent" not in result.output


# -- clevagent demo: how it judges ----------------------------------------------------------------------------------------


def told(**changes):
    """A scene that went well, of a provider that tells usage."""
    scene = SceneResult(
        title="Told",
        ceiling_pico=10 * CENT,
        tells_usage=True,
        unguarded=Bill(billed_pico=50 * CENT, requests=50),
        guarded=Bill(billed_pico=9 * CENT, requests=9),
        ledger_pico=9 * CENT,
        refused=41,
    )
    return replace(scene, **changes)


def untold(**changes):
    """A scene that went well, of a provider that does not."""
    return told(**{"title": "Untold", "tells_usage": False, "ledger_pico": 10 * CENT} | changes)


def test_the_exit_code_is_0_if_every_ceiling_held_and_every_ledger_agrees():
    assert [told().verdict, untold().verdict] == ["held", "held"]
    assert exit_code([told(), untold()]) == 0


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        pytest.param(told(guarded=Bill(billed_pico=10 * CENT + 1, requests=11), ledger_pico=10 * CENT + 1), "PASSED", id="told"),
        pytest.param(untold(guarded=Bill(billed_pico=10 * CENT + 1, requests=11)), "PASSED", id="untold"),
        pytest.param(told(ledger_pico=9 * CENT - 1), "DISAGREES", id="told-too-low"),
        pytest.param(told(ledger_pico=9 * CENT + 1), "DISAGREES", id="told-too-high"),
        pytest.param(untold(ledger_pico=9 * CENT - 1), "DISAGREES", id="untold-below-the-bill"),
        pytest.param(untold(ledger_pico=10 * CENT + 1), "DISAGREES", id="untold-above-the-ceiling"),
        pytest.param(told(guarded=Bill(billed_pico=0, requests=0), ledger_pico=0), "NOTHING SENT", id="all-refused"),
    ],
)
def test_one_pico_past_a_ceiling_or_between_the_books_makes_the_exit_code_1(invoke, monkeypatch, result, verdict):
    """Through the command: it exits with what the results say, whatever else went well."""
    report = pytest.importorskip("clevagent.demo.report")
    monkeypatch.setattr(report, "perform", lambda: [told(), result, untold()])
    assert result.verdict == verdict
    assert invoke("demo").exit_code == 1
    complaint = " ".join(report.explanations([told(), result, untold()]))
    assert "This is a bug of ClevAgent" in complaint
    assert "passed none" not in complaint


@pytest.mark.parametrize(
    ("result", "is_good"),
    [
        pytest.param(told(guarded=Bill(billed_pico=10 * CENT, requests=10), ledger_pico=10 * CENT), True, id="at-the-ceiling"),
        pytest.param(untold(ledger_pico=9 * CENT), True, id="untold-at-the-bill"),
        pytest.param(untold(ledger_pico=10 * CENT), True, id="untold-at-the-ceiling"),
    ],
)
def test_what_fills_its_ceiling_exactly_has_held_it(result, is_good):
    assert (exit_code([result]) == 0) is is_good


def test_a_share_below_the_ceiling_never_reads_as_the_whole_of_it():
    report = pytest.importorskip("clevagent.demo.report")
    console = Console(file=io.StringIO(), width=80)
    console.print(report.result_table([told(guarded=Bill(billed_pico=10 * CENT - 1, requests=9), ledger_pico=10 * CENT - 1)]))
    assert "99.9 %" in console.file.getvalue()
    assert "100.0 %" not in console.file.getvalue()


# -- clevagent demo: itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def performance():
    """The demo played once in this process, in a hostile environment: its results and what it printed. It leaves no trace of itself."""
    report = pytest.importorskip("clevagent.demo.report")
    console = Console(file=io.StringIO(), width=80)
    logger = logging.getLogger("clevagent")
    before = logger.handlers, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FOREIGN_SETTINGS.items():
            patch.setenv(name, value)
        environment, watchdog = dict(os.environ), default._watchdog
        results = report.perform(console)
        assert dict(os.environ) == environment
        assert default._watchdog is watchdog
    assert (logger.handlers, logger.propagate) == before
    return results, console.file.getvalue()


@pytest.mark.slow
def test_every_ceiling_of_the_demo_holds_and_every_ledger_agrees_with_the_bill(performance):
    results, _ = performance
    assert exit_code(results) == 0
    assert [result.title for result in results] == [
        "Re-parsing agent",
        "Fan-out of 50",
        "Streams broken off",
        "Retries after timeouts",
    ]
    for result in results:
        assert result.overshoot_pico == 0
        assert 0.8 * result.ceiling_pico <= result.guarded.billed_pico <= result.ledger_pico <= result.ceiling_pico
        assert result.unguarded.billed_pico >= 5 * result.ceiling_pico
        assert result.refused > 0
    for result in results[:2]:
        assert result.ledger_pico == result.guarded.billed_pico


@pytest.mark.slow
def test_the_demos_scenes_are_what_they_say(performance):
    """Forty calls of the agent; fifty of a cent each against room for ten; three requests for each call that times out."""
    (parsing, fan_out, streams, retries), _ = performance
    assert parsing.unguarded.requests == 40
    assert 10 <= parsing.guarded.requests < 40
    for result in (fan_out, streams):
        assert result.unguarded == Bill(billed_pico=50 * CENT, requests=50)
        assert (result.guarded.requests, result.refused) == (10, 40)
    assert retries.unguarded == Bill(billed_pico=60 * CENT, requests=60)
    assert retries.guarded.requests == 10


@pytest.mark.slow
def test_the_demo_prints_the_numbers_of_its_results(performance):
    results, output = performance
    table = output[output.index("Ceiling  ") :]
    for label, cells in (
        ("Ceiling ", [f"${result.ceiling_pico / 10**12:.6f}" for result in results]),
        ("ledger says", [f"${result.ledger_pico / 10**12:.6f}" for result in results]),
        ("requests refused", [str(result.refused) for result in results]),
        ("overshoot", ["$0.000000"] * 4),
        ("usage was told", ["yes", "yes", "no", "no"]),
        ("ledger agrees", ["yes"] * 4),
        ("Verdict", ["held"] * 4),
    ):
        (line,) = [line for line in table.splitlines() if line.strip().startswith(label)]
        assert line.strip().removeprefix(label.strip()).split() == cells
    assert "passed none" in output


@pytest.mark.slow
def test_the_demo_as_a_command_in_a_pipe_prints_plain_lines_and_exits_with_0():
    """No escape codes, no log lines, nothing wider than 80 columns, and nothing on stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "FORCE_COLOR"}} | FOREIGN_SETTINGS
    command = [sys.executable, "-c", f"from {cli.__name__} import main; main()", "demo"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.count("held") >= 4
