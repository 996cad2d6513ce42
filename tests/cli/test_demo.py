"""The command ``clevagent demo``: what it needs, how it judges, and the whole of it once."""

import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
from click.testing import CliRunner
from inline_snapshot import snapshot
from rich.console import Console

from clevagent import cli
from clevagent.cli import main
from clevagent.demo.results import Bill, GuardedAct, SceneResult, exit_code
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core import default

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
def invoke():
    """Run the command in this process."""
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


# -- when it cannot run -----------------------------------------------------------------------------------


def test_without_its_extra_the_demo_says_what_is_missing_and_how_to_get_it(invoke, monkeypatch):
    """The name on the public index belongs to another package: it is never suggested."""
    monkeypatch.setitem(sys.modules, "langchain_openai", None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert "langchain_openai" in result.output
    assert "langchain_core" not in result.output
    assert 'pip install ".[demo]"' in result.output
    assert "pip install clevagent" not in result.output


# -- how it judges ----------------------------------------------------------------------------------------


def told(**changes):
    """A scene that went well, of a provider that tells usage."""
    scene = SceneResult(
        title="Told",
        ceiling_pico=10 * CENT,
        tells_usage=True,
        means="ceiling",
        unguarded=Bill(billed_pico=50 * CENT, requests=50),
        guarded=Bill(billed_pico=9 * CENT, requests=9),
        act=GuardedAct(ledger_pico=9 * CENT, refused=41, stopped_by="ceiling"),
    )
    act = {name: changes.pop(name) for name in list(changes) if name in GuardedAct.__slots__}
    return replace(scene, act=replace(scene.act, **act), **changes)


def untold(**changes):
    """A scene that went well, of a provider that does not."""
    return told(**{"title": "Untold", "tells_usage": False, "ledger_pico": 10 * CENT} | changes)


def looping(**changes):
    """A scene in which the loop guard stopped the agent, as it should."""
    return told(**{"title": "Looping", "means": "loop", "stopped_by": "loop", "refused": 1} | changes)


def test_the_exit_code_is_0_if_all_were_stopped_by_what_should_and_every_ledger_agrees():
    assert [told().verdict, untold().verdict, looping().verdict] == ["held", "held", "held"]
    assert exit_code([told(), untold(), looping()]) == 0


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
        pytest.param(told(held_pico=1), "DISAGREES", id="told-and-held"),
        pytest.param(untold(ledger_pico=9 * CENT, held_pico=1), "DISAGREES", id="untold-and-held"),
        pytest.param(told(refused=0, stopped_by=None), "NOT STOPPED", id="stopped-by-nothing"),
        pytest.param(looping(stopped_by="ceiling"), "NOT STOPPED", id="a-loop-stopped-by-the-ceiling"),
        pytest.param(looping(stopped_by=None), "NOT STOPPED", id="a-loop-stopped-by-nothing"),
        pytest.param(told(stopped_by="loop"), "NOT STOPPED", id="a-ceiling-that-a-loop-came-before"),
    ],
)
def test_one_pico_past_a_ceiling_or_between_the_books_or_another_stop_makes_the_exit_code_1(invoke, monkeypatch, result, verdict):
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


# -- itself -----------------------------------------------------------------------------------------------


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
    assert [(result.title, result.means, result.act.stopped_by) for result in results] == [
        ("Re-parsing agent", "ceiling", "ceiling"),
        ("Fan-out of 50", "ceiling", "ceiling"),
        ("Streams broken off", "ceiling", "ceiling"),
        ("Retries after timeouts", "ceiling", "ceiling"),
        ("Five processes", "ceiling", "ceiling"),
        ("Going in circles", "loop", "loop"),
        ("A loop of one's own", "ceiling", "ceiling"),
        ("A graph that fans out", "ceiling", "ceiling"),
        *([("A crew, 30 times", "ceiling", "ceiling")] if find_spec("crewai") else []),
    ]
    for result in results:
        assert result.overshoot_pico == 0
        assert result.guarded.billed_pico <= result.act.ledger_pico <= result.ceiling_pico
        assert result.act.held_pico == 0
        assert result.act.refused > 0
        assert result.act.ledger_pico == result.guarded.billed_pico or not result.tells_usage
    for result in results[:5]:
        assert result.guarded.billed_pico >= 0.8 * result.ceiling_pico
        assert result.unguarded.billed_pico >= 4 * result.ceiling_pico


@pytest.mark.slow
def test_the_demos_scenes_are_what_they_say(performance):
    """Forty calls of an agent; fifty of a cent each against room for ten; three requests for each call that times out."""
    (parsing, fan_out, streams, retries, processes, circles, client, graph, *crew), _ = performance
    assert parsing.unguarded.requests == 40
    assert 10 <= parsing.guarded.requests < 40
    for result in (fan_out, streams):
        assert result.unguarded == Bill(billed_pico=50 * CENT, requests=50)
        assert (result.guarded.requests, result.act.refused) == (10, 40)
    assert retries.unguarded == Bill(billed_pico=60 * CENT, requests=60)
    assert retries.guarded.requests == 10
    # One call of the process that is killed was answered, and one was not; the others make all of theirs.
    assert processes.unguarded == Bill(billed_pico=42 * CENT, requests=42)
    assert (processes.guarded.requests, processes.act.refused) == (10, 4 * 10 - 8)
    assert circles.unguarded.requests == 40
    assert (circles.guarded.requests, circles.act.refused) == (7, 1)
    assert circles.guarded.billed_pico < 0.02 * circles.ceiling_pico
    assert client.unguarded.requests == 60
    assert client.guarded.requests < 40
    assert graph.unguarded == Bill(billed_pico=50 * CENT, requests=50)
    assert (graph.guarded.requests, graph.act.refused) == (9, 41)
    for result in crew:  # a prompt of CrewAI's own: about a cent
        assert result.unguarded.requests == 30
        assert result.guarded.billed_pico >= 0.8 * result.ceiling_pico


def test_each_scene_is_two_lines_of_a_table_that_fits_80_columns():
    report = pytest.importorskip("clevagent.demo.report")
    console = Console(file=io.StringIO(), width=80)
    longest = "Retries after timeouts"
    console.print(report.result_table([told(title=longest), untold(), looping(), looping(stopped_by=None, held_pico=1)]))
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == snapshot(
        [
            "                        Unguarded    Guarded     Guarded     Ledger",
            "Scene                      billed     billed    requests       says  Verdict",
            "───────────────────────────────────────────────────────────────────────────────",
            "Retries after timeouts  $0.500000  $0.090000      9 sent  $0.090000  held",
            "  ceiling $0.10            5.00 x     90.0 %  41 refused      equal  by ceiling",
            "",
            "Untold                  $0.500000  $0.090000      9 sent  $0.100000  held",
            "  ceiling $0.10            5.00 x     90.0 %  41 refused  covers it  by ceiling",
            "",
            "Looping                 $0.500000  $0.090000      9 sent  $0.090000  held",
            "  ceiling $0.10            5.00 x     90.0 %   1 refused      equal  loop found",
            "",
            "Looping                 $0.500000  $0.090000      9 sent  $0.090000  DISAGREES",
            "  ceiling $0.10            5.00 x     90.0 %   1 refused  DISAGREES  by nothing",
        ]
    )


@pytest.mark.slow
def test_the_demo_prints_the_numbers_of_its_results(performance):
    results, output = performance
    table = output[output.index("Scene  ") :]
    for result in results:
        first, second = table[table.index(result.title) :].splitlines()[:2]
        billed = [f"${bill.billed_pico / 10**12:.6f}" for bill in (result.unguarded, result.guarded)]
        sent = f"{result.guarded.requests} sent"
        assert first.removeprefix(result.title).split() == [
            *billed,
            *sent.split(),
            f"${result.act.ledger_pico / 10**12:.6f}",
            "held",
        ]
        assert second.split()[:2] == ["ceiling", f"${result.ceiling_pico / 10**12:.2f}"]
        assert f" {result.act.refused} refused " in second
        assert (" equal " in second) is result.tells_usage
        assert second.endswith("loop found" if result.means == "loop" else "by ceiling")
    assert "passed none" in output
    assert "It was stopped after 7 calls" in " ".join(output.split())


@pytest.mark.slow
def test_the_demo_as_a_command_in_a_pipe_prints_plain_lines_and_exits_with_0():
    """No escape codes, no log lines, nothing wider than 80 columns, and nothing on stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "FORCE_COLOR"}} | FOREIGN_SETTINGS
    command = [sys.executable, "-c", f"from {cli.__name__} import main; main()", "demo"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.count("held") >= 8


# -- its processes --------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, subprocess, threading
from clevagent.demo.scenes import SCENES
from clevagent.testing import LoopbackProvider

pids = []
popen = subprocess.Popen

def start(*args, **given):
    process = popen(*args, **given)
    pids.append(process.pid)
    return process

def interrupt():
    if provider.wait_for_requests(2, timeout_s=200):
        os.kill(os.getpid(), signal.SIGINT)

subprocess.Popen = start
(scene,) = [scene for scene in SCENES if scene.title == "Five processes"]
with LoopbackProvider(scene.replies) as provider:
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        scene.play_guarded(provider, [])
    except KeyboardInterrupt:
        print(*pids)
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_demo_that_is_interrupted_leaves_no_process_and_no_file(tmp_path):
    """Ctrl-C in the middle of the guarded act, while one process waits for its answer and four are about to begin."""
    pytest.importorskip("langchain_openai")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 5
    assert [pid for pid in pids if is_running(pid)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_worker_whose_parent_is_gone_ends(has_begun):
    """Whatever became of the demo (SIGKILL, too): its end of the pipe is closed, and the worker ends in the middle of its call."""
    pytest.importorskip("langchain_openai")
    with LoopbackProvider([Reply(hang=True)]) as provider:
        orders = {"base_url": provider.openai_url, "tries": 1, "ceiling": "0.10", "ledger": None, "block": []}
        command = [sys.executable, "-m", "clevagent.demo.worker", json.dumps(orders)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
            assert worker.stdout.readline() == b"ready\n"
            if has_begun:
                worker.stdin.write(b"!")
                worker.stdin.flush()
                assert provider.wait_for_requests(1, timeout_s=60)
            worker.stdin.close()
            assert worker.wait(60) == 3


@pytest.mark.slow
def test_a_worker_that_fails_is_told_with_what_it_wrote():
    """Not a hang, and not a number that means nothing."""
    processes = pytest.importorskip("clevagent.demo.processes")
    scenes = pytest.importorskip("clevagent.demo.scenes")
    (scene,) = [scene for scene in scenes.SCENES if isinstance(scene, processes.SharedCeiling)]
    with LoopbackProvider() as provider, pytest.raises(RuntimeError, match=r"(?s)cannot be played\. It wrote:.*no_such_plugin"):
        replace(scene, processes=1).play_guarded(provider, ["no_such_plugin"])
