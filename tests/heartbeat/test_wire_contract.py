"""What every monitor does with beats: the contract of docs/wire.md, through the ASGI door and by nothing but HTTP.

Another monitor passes this file by one more parameter of the fixture ``monitor``: an application, and how a person gives it commands
and ceilings.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from clevagent import Amounts, Beat, Budget, Incident
from clevagent.testing import HeartbeatReceiver
from clevagent_heartbeat import pulse
from clevagent_wire.beats import INCIDENT_FIELDS

KEY = "cv_right"
ONE, BATCH, STATUS, COMMANDS = "/api/v1/heartbeat", "/api/v1/heartbeat/batch", "/api/v1/status", "/api/v1/commands"
ROUTES = [("POST", ONE), ("POST", BATCH), ("GET", STATUS), ("GET", COMMANDS), ("POST", f"{COMMANDS}/c1/result")]
NOON = 1_800_000_000.0
STOP = {"id": "c1", "command": "stop", "by": "ana", "reason": "It writes to the wrong table.", "run_id": None}
PAUSE = {"id": "c2", "command": "pause", "by": "ben", "reason": "", "run_id": "run-1"}


class Monitor:
    """A client of one application, with the right key."""

    def __init__(self, app, runner, *, command, limit):
        self._app = app
        self._runner = runner
        self.command = command
        """Give a command, as a person does on the page."""
        self.limit = limit
        """Set a ceiling, the same way."""

    def ask(self, method, path, *, key=KEY, **what):
        return self._runner.run(self._ask(method, path, {} if key is None else {"X-API-Key": key}, what))

    async def _ask(self, method, path, headers, what):
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://monitor", headers=headers) as client:
            return await client.request(method, path, **what)

    def beat(self, *beats, status=200):
        """Send beats one by one; give the last answer."""
        for beat in beats:
            response = self.ask("POST", ONE, json=beat)
            assert response.status_code == status, response.text
        return response.json()

    def batch(self, *beats):
        response = self.ask("POST", BATCH, json={"heartbeats": beats})
        assert response.status_code == 200, response.text
        return response.json()

    def about(self, agent="research"):
        """What the monitor knows of an agent; ``None``: nothing."""
        return self.ask("GET", STATUS).json()["agents"].get(agent)


@pytest.fixture(params=["receiver"])
def monitor(request):
    with asyncio.Runner() as runner:
        app = HeartbeatReceiver(api_key=KEY)
        yield Monitor(app, runner, command=app.commands.append, limit=app.budgets.append)


def beat(seq=1, boot="boot-1", **changes):
    """Make the beat ``seq`` of a process that uses 100 tokens and one cent from each beat to the next."""
    each = Amounts(input_tokens=80, output_tokens=20, cost_pico=10**10, llm_calls=1, steps=2)
    made = Beat(
        agent="research",
        boot_id=boot,
        seq=seq,
        sent_at=NOON + 30 * seq,
        amounts=each,
        totals=Amounts(**{spec.name: seq * getattr(each, spec.name) for spec in fields(Amounts)}),
        progress_age_s=1.5,
        host="worker-7",
        pid=4711,
    )
    return made.to_wire() | changes


def used(monitor, agent="research"):
    about = monitor.about(agent)
    return about["beats"], about["tokens"], round(about["cost_usd"], 6)


# -- what is taken ----------------------------------------------------------------------------------------------------------


def test_the_answer_to_a_beat_has_its_fields(monitor):
    answer = monitor.beat(beat())
    assert answer == {
        "ok": True, "agent_id": answer["agent_id"], "status": "ok", "warning": None, "reason": None, "budgets": [], "commands": [],
    }  # fmt: skip


def test_an_agent_keeps_its_id_and_another_has_its_own(monitor):
    ids = [monitor.beat(beat(seq, agent=agent, boot_id=agent))["agent_id"] for seq, agent in ((1, "a"), (1, "b"), (2, "a"))]
    assert ids[0] == ids[2] != ids[1]


def test_a_beat_that_comes_again_counts_once(monitor):
    monitor.beat(beat(), beat(), beat())
    assert used(monitor) == (1, 100, 0.01)


def test_a_repeat_changes_nothing_whatever_it_says(monitor):
    monitor.beat(beat(), beat(status="error", tokens_used=999, totals=beat(9)["totals"]))
    assert (used(monitor), monitor.about()["status"]) == ((1, 100, 0.01), "ok")


def test_the_same_number_in_another_process_is_another_beat(monitor):
    monitor.beat(beat(boot="boot-1"), beat(boot="boot-2"))
    assert used(monitor) == (2, 200, 0.02)


def test_beats_out_of_order_count_once_each(monitor):
    monitor.beat(beat(3), beat(1), beat(2), beat(1))
    assert used(monitor) == (3, 300, 0.03)


def test_a_late_beat_says_nothing_about_now(monitor):
    monitor.beat(beat(3, status="warning"), beat(1, status="error"))
    about = monitor.about()
    assert (about["status"], about["sent_at"]) == ("warning", NOON + 90)


def test_beats_of_an_outage_keep_the_times_at_which_they_were_made(monitor):
    monitor.batch(*(beat(seq) for seq in range(1, 121)))
    assert monitor.about()["sent_at"] == NOON + 3600


def test_a_lost_beat_loses_no_money(monitor):
    monitor.beat(beat(1), beat(4, dropped=2))
    assert used(monitor) == (2, 400, 0.04)


def test_a_batch_tells_how_many_are_new(monitor):
    answer = monitor.batch(beat(1), beat(2), beat(3))
    assert (answer["accepted"], answer["repeats"], answer["ok"]) == (3, 0, True)
    assert answer.keys() - {"accepted", "repeats"} == monitor.beat(beat(4)).keys()


def test_a_batch_that_was_partly_taken_before_is_taken_for_the_rest(monitor):
    monitor.beat(beat(2))
    answer = monitor.batch(beat(1), beat(2), beat(3), beat(3))
    assert (answer["accepted"], answer["repeats"]) == (2, 2)
    assert used(monitor) == (3, 300, 0.03)


def test_a_beat_without_a_number_is_taken_and_each_of_them_counts(monitor):
    """As other clients send it: an agent, a status, and amounts."""
    plain = {"agent": "collector", "status": "step_complete", "tokens_used": 5, "cost_usd": 0.02}
    answer = monitor.beat(plain, plain, {"agent": "collector", "message": None})
    assert answer["status"] == "ok"
    assert used(monitor, "collector") == (3, 10, 0.04)


def test_the_status_is_the_one_that_the_agent_told_last(monitor):
    assert monitor.beat(beat(1, status="step_complete"))["status"] == "step_complete"
    assert monitor.beat(beat(2, kind="shutdown", status="shutdown"))["status"] == "shutdown"


def test_fields_that_are_not_known_here_are_let_pass(monitor):
    monitor.beat(beat(sdk_version="9.9"))
    assert monitor.about()["beats"] == 1


def test_an_incident_is_taken_with_what_else_it_tells(monitor):
    incident = {"kind": "stall", "message": "Nothing has moved.", "at": NOON, "details": {"stack": ["a.py:47 in recv"]}}
    monitor.beat(beat(incidents=[incident]))
    assert monitor.about()["beats"] == 1


# -- what is refused --------------------------------------------------------------------------------------------------------

WRONG = {
    "agent": ["", 5, None, "x" * 201],
    "status": ["", 5, None, "x" * 201],
    "message": [5, ["hi"]],
    "tokens_used": [-1, 1.5, "5", True, 2**63],
    "cost_usd": [-0.01, "0.01", True],
    "tool_calls": [-1, 0.5],
    "llm_calls": [-1, None],
    "steps": ["1"],
    "loops": [-1],
    "refusals": [-1],
    "iteration_count": [1.5, "3"],
    "memory_mb": [-1, "12", 10**400],
    "meta": [[], "text"],
    "run_id": ["", 5],
    "boot_id": ["", None, 5],
    "seq": [0, -1, 1.0, "1", None, True],
    "sent_at": [None, "2026-11-23T12:00:00Z", -1],
    "kind": ["heartbeat", None, []],
    "progress_age_s": [-0.1, "1"],
    "interval_s": [0, -30, None],
    "totals": [None, {}, beat()["totals"] | {"tokens": -1}, beat()["totals"] | {"cost_usd": None}],
    "dropped": [-1, None],
    "incidents": [None, {}, ["stall"], [{"kind": "stall"}], [{"message": "hi"}]],
    "host": [None, 5],
    "pid": [-1, "4711"],
}


def test_each_field_of_a_beat_is_tried_with_wrong_values():
    assert set(WRONG) == set(beat())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_beat_with_a_wrong_field_is_refused_by_name_and_value(monitor, name, value):
    wrong = beat() | {name: value}
    for path, body in ((ONE, wrong), (BATCH, {"heartbeats": [beat(2), wrong]})):
        response = monitor.ask("POST", path, json=body)
        answer = response.json()
        assert (response.status_code, answer["ok"], answer["field"]) == (422, False, name)
        assert name in answer["error"]
        assert repr(value)[:50] in answer["error"]
    assert monitor.about() is None


@pytest.mark.parametrize("name", ["agent", "boot_id", "seq", "sent_at", "totals"])
def test_a_numbered_beat_has_all_that_its_number_needs(monitor, name):
    body = beat()
    del body[name]
    assert monitor.beat(body, status=422)["field"] == name
    assert monitor.about() is None


@pytest.mark.parametrize("body", [{}, {"heartbeats": None}, {"heartbeats": []}, {"heartbeats": [5]}, {"heartbeats": {}}])
def test_a_batch_without_beats_is_refused(monitor, body):
    response = monitor.ask("POST", BATCH, json=body)
    assert (response.status_code, response.json()["field"]) == (422, "heartbeats")


@pytest.mark.parametrize("path", [ONE, BATCH])
@pytest.mark.parametrize("body", [b"", b"beat", b'{"agent": ', b'{"agent": "a", "cost_usd": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(monitor, path, body):
    response = monitor.ask("POST", path, content=body)
    assert (response.status_code, response.json()["ok"]) == (400, False)


def test_json_that_is_no_object_is_refused(monitor):
    assert monitor.ask("POST", ONE, json=[beat()]).status_code == 422


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("key", [None, "", "cv_wrong"])
def test_without_the_right_key_nobody_is_let_in(monitor, method, path, key):
    monitor.command(STOP)
    response = monitor.ask(method, path, key=key, json=beat() if method == "POST" else None)
    assert (response.status_code, response.json()["ok"]) == (401, False)
    assert "stop" not in response.text
    assert monitor.about() is None


def padded(length):
    """Make the text of a beat that is so many bytes long."""
    empty = json.dumps(beat(message=""))
    return json.dumps(beat(message="x" * (length - len(empty)))).encode()


def test_a_request_of_a_million_bytes_is_taken_and_a_larger_one_is_not(monitor):
    assert monitor.ask("POST", ONE, content=padded(1_000_001)).status_code == 413
    assert monitor.about() is None
    assert monitor.ask("POST", ONE, content=padded(1_000_000)).status_code == 200


def test_a_batch_of_a_thousand_beats_is_taken_and_a_larger_one_is_not(monitor):
    plain = [{"agent": "research"}] * 1001
    assert monitor.ask("POST", BATCH, json={"heartbeats": plain}).status_code == 413
    assert monitor.about() is None
    assert monitor.batch(*plain[:1000])["accepted"] == 1000


@pytest.mark.parametrize(
    "path", ["/", "/api/v1", "/api/v1/heartbeats", "/api/v1/heartbeat/", "/api/v2/heartbeat", "/api/v1/commands/c1"]
)
def test_a_path_that_is_none_is_not_found(monitor, path):
    response = monitor.ask("POST", path, json=beat())
    assert (response.status_code, response.json()["ok"]) == (404, False)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_path_that_takes_another_method_says_which(monitor, method, path):
    for other in {"GET", "POST", "PUT", "DELETE"} - {method}:
        response = monitor.ask(other, path)
        assert (response.status_code, response.headers["Allow"]) == (405, method)


# -- commands and ceilings --------------------------------------------------------------------------------------------------


def test_a_command_is_told_with_every_answer_until_its_result_has_come(monitor):
    monitor.command(STOP)
    monitor.command(PAUSE)
    both = [STOP, PAUSE]
    assert monitor.beat(beat(1))["commands"] == both
    assert monitor.beat(beat(1))["commands"] == both
    assert monitor.batch(beat(2), beat(3))["commands"] == both
    assert monitor.ask("GET", COMMANDS).json() == {"ok": True, "commands": both}
    response = monitor.ask("POST", f"{COMMANDS}/c1/result", json={"status": "done", "message": ""})
    assert (response.status_code, response.json()) == (200, {"ok": True})
    assert monitor.beat(beat(4))["commands"] == [PAUSE]
    monitor.ask("POST", f"{COMMANDS}/c2/result", json={"status": "failed", "message": "There is no such run."})
    assert monitor.ask("GET", COMMANDS).json()["commands"] == []


def test_a_result_may_come_twice(monitor):
    monitor.command(STOP)
    result = {"status": "done", "message": ""}
    assert [monitor.ask("POST", f"{COMMANDS}/c1/result", json=result).status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("result", [{}, {"status": "maybe"}, {"status": None}, {"status": ["done"]}])
def test_a_result_that_is_none_is_refused_and_the_command_is_told_again(monitor, result):
    monitor.command(STOP)
    response = monitor.ask("POST", f"{COMMANDS}/c1/result", json=result)
    assert (response.status_code, response.json()["field"]) == (422, "status")
    assert monitor.beat(beat())["commands"] == [STOP]


def test_the_result_of_no_command_is_not_found(monitor):
    assert monitor.ask("POST", f"{COMMANDS}/c9/result", json={"status": "done"}).status_code == 404


def test_each_answer_tells_the_ceilings_that_hold(monitor):
    ceiling = {"name": "page", "usd": 5.0, "per": "day"}
    monitor.limit(ceiling)
    assert monitor.beat(beat(1))["budgets"] == [ceiling]
    (told,) = monitor.batch(beat(2))["budgets"]
    assert Budget(**told) == Budget(name="page", usd=5.0, per="day")


# -- the page ---------------------------------------------------------------------------------------------------------------

PATH = Path(__file__).parents[2] / "docs" / "wire.md"
PAGE = PATH.read_text()
TYPES = {str: "text", int: "whole number", float: "number", dict: "object", list: "list"}
AMOUNTS = {"tokens_used": "tokens", "cost_usd": "cost_pico"}
"""Where a number on the wire is called otherwise than in ``Amounts``."""


def sentences(kind):
    """The docstring under each field of a class, and of its properties."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    found = {node.name: ast.get_docstring(node) for node in body if isinstance(node, ast.FunctionDef)}
    for before, node in itertools.pairwise(body):
        if isinstance(before, ast.AnnAssign) and isinstance(node, ast.Expr):
            found[before.target.id] = inspect.cleandoc(node.value.value)
    return {name: " ".join(text.replace("``", "`").split()) for name, text in found.items() if text}


def wrapped(text):
    return textwrap.fill(text, 132, subsequent_indent="  ", break_on_hyphens=False)


def line(name, value, field, text):
    is_optional = any(spec.name == field and "None" in spec.type for spec in fields(Beat))
    also = f"; in Python `{field}`" if field != name else " or null" if is_optional else ""
    return wrapped(f"- `{name}` ({TYPES[type(value)]}{also}): {text}")


def list_of_fields():
    """Write down each field of a beat that goes over the wire, as its docstring explains it."""
    full = Beat(agent="a", boot_id="b", seq=1, sent_at=1.0, run_id="r", progress_age_s=1.0, iteration_count=1, memory_mb=1.0)
    of_beat, of_amounts = sentences(Beat), sentences(Amounts)
    lines = []
    for name, value in full.to_wire().items():
        amount = AMOUNTS.get(name, name)
        assert (name in of_beat) != (amount in of_amounts), name
        is_own = name in of_beat
        lines.append(line(name, value, name if is_own else f"amounts.{amount}", of_beat[name] if is_own else of_amounts[amount]))
    return "\n".join(lines)


def list_of_totals():
    of_amounts = sentences(Amounts)
    amounts = [(name, AMOUNTS.get(name, name), value) for name, value in beat()["totals"].items()]
    return "\n".join(line(name, value, f"totals.{amount}", of_amounts[amount]) for name, amount, value in amounts)


def list_of_incident():
    of_incident = sentences(Incident)
    return "\n".join(wrapped(f"- `{name}`: {of_incident[name]}") for name in INCIDENT_FIELDS)


def section(title):
    """The list under a heading of the page."""
    body = PAGE.partition(f"\n{title}\n")[2]
    return re.search(r"^- .*?(?=\n\n|\Z)", body, re.MULTILINE | re.DOTALL)[0].rstrip()


LISTS = [("## A beat", list_of_fields), ("### Totals", list_of_totals), ("### Incidents", list_of_incident)]


@pytest.mark.parametrize(("title", "expected"), LISTS)
def test_the_page_lists_each_field_that_leaves_the_process_as_the_code_explains_it(title, expected):
    assert section(title) == expected(), "run this file as a program: it writes the lists of the page anew"


def test_nothing_but_the_listed_fields_of_an_incident_is_sent():
    incident = Incident(kind="stall", message="Nothing has moved.", details={"stack": ["a.py:47 in recv"]})
    assert set(pulse._told(incident)) == set(re.findall(r"^- `(\w+)`", section("### Incidents"), re.MULTILINE))


def examples():
    return [json.loads(code) for code in re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


def test_the_page_shows_a_beat_with_all_its_fields_that_a_monitor_takes(monitor):
    shown = examples()[0]
    assert list(shown) == list(beat())
    assert list(shown["totals"]) == list(beat()["totals"])
    monitor.beat(shown)


def test_the_page_shows_the_answer_that_a_monitor_gives(monitor):
    shown = examples()[1]
    for command in shown["commands"]:
        monitor.command(command)
    for ceiling in shown["budgets"]:
        monitor.limit(ceiling)
        Budget(**ceiling)
    answer = monitor.beat(beat(status=shown["status"]))
    assert answer | {"agent_id": shown["agent_id"]} == shown


if __name__ == "__main__":
    written = PAGE
    for title, expected in LISTS:
        written = written.replace(section(title), expected())
    PATH.write_text(written)
