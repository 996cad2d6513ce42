"""Our own labelled corpus: whole runs as an agent would leave them, written as tools, arguments and results.

Each run is the tool calls of one run, or the model calls of one conversation, in the order in which they ended. A loop says where
its first round begins and how many calls one round has, so that a test can count the rounds until it is found. To add a run, write
a function and mark it ``@loop`` or ``@healthy``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from clevagent_core.guards.fingerprints import arguments_of, result_of
from clevagent_core.guards.repetition import Sign


@dataclass
class Call:
    tool: str
    arguments: Any = None
    result: Any = None
    failed: bool = False
    node: str | None = None
    began: int | None = None
    """How many calls had ended when this one began; ``None``: all that stand before it."""

    def sign(self) -> Sign:
        failed = self.failed or isinstance(self.result, BaseException)
        return Sign((self.tool, self.node), *arguments_of(self.arguments), *result_of(self.result, failed=failed), failed)


@dataclass
class Loop:
    """Calls that loop: from call ``begins`` on, in rounds of ``period`` calls."""

    calls: list[Call]
    begins: int
    period: int


LOOPS: dict[str, Callable[[], Loop]] = {}
HEALTHY: dict[str, Callable[[], Iterator[Call]]] = {}
_ROUNDS = 12


def loop(*, period: int = 1, after: int = 3) -> Callable[[Callable[[int], Iterator[Call]]], Callable[[int], Iterator[Call]]]:
    """Register a function that gives the calls of its round; ``after`` ordinary calls come before the first."""

    def register(rounds: Callable[[int], Iterator[Call]]) -> Callable[[int], Iterator[Call]]:
        def made() -> Loop:
            calls = list(_beginning())[:after]
            for number in range(_ROUNDS):
                calls.extend(rounds(number))
            return Loop(calls, after, period)

        LOOPS[rounds.__name__] = made
        return rounds

    return register


def healthy(run: Callable[[], Iterator[Call]]) -> Callable[[], Iterator[Call]]:
    HEALTHY[run.__name__] = run
    return run


def _beginning() -> Iterator[Call]:
    yield Call("list_directory", {"path": "."}, "README.md\nsetup.py\nsrc\ntests")
    yield Call("read_file", {"path": "setup.py"}, "from setuptools import setup\nsetup(name='shop')")
    yield Call("run_shell", {"command": "pytest -q"}, "3 failed, 14 passed in 0.83s", failed=True)


def _uuid(number: int) -> str:
    return str(uuid.UUID(int=Random(number).getrandbits(128), version=4))  # noqa: S311 - the same in each run of the tests


# Loops


@loop()
def same_search_same_hits(number):
    yield Call("search_web", {"query": "flights Lisbon to Oslo 12 May"}, {"hits": [{"title": "Cheap flights", "price": 129}]})


@loop(after=0)
def a_ping_without_arguments(number):
    yield Call("step_complete")


@loop()
def same_error_retried(number):
    yield Call("charge_card", {"amount": 4200, "currency": "EUR"}, PermissionError("card declined"))


@loop()
def same_error_with_a_new_request_number_each_time(number):
    yield Call("create_ticket", {"title": "Refund"}, RuntimeError(f"500 Internal Server Error (request {_uuid(number)})"))


@loop()
def shell_error_whose_line_counts_up(number):
    yield Call("bash", "apt-get instal jq", f"bash: line {12 + 3 * number}: apt-get: command not found", failed=True)


@loop()
def arguments_in_another_order(number):
    items = [("city", "Oslo"), ("unit", "celsius"), ("days", 3)]
    yield Call("get_weather", dict(items if number % 2 else items[::-1]), "-2, -1, 0")


@loop()
def arguments_as_json_with_other_white_space(number):
    yield Call(
        "get_weather", json.dumps({"city": "Oslo", "days": 3}, indent=number % 3 or None), "-2, -1,   0" + "\n" * (number % 2)
    )


@loop()
def arguments_with_a_counter(number):
    yield Call("fetch_invoice", {"invoice": "2026-114", "attempt": number + 1}, {"state": "missing"})


@loop()
def arguments_with_a_timestamp(number):
    yield Call("fetch_invoice", {"invoice": "2026-114", "timestamp": f"2026-01-31T10:15:{number:02}Z"}, {"state": "missing"})


@loop()
def arguments_with_a_request_id(number):
    yield Call("fetch_invoice", {"invoice": "2026-114", "meta": {"requestId": _uuid(number)}}, {"state": "missing"})


@loop()
def a_url_with_a_cache_breaker(number):
    yield Call("http_get", f"https://shop.example/api/stock?sku=77&ts={1_769_854_507 + 7 * number}", "[]")


@loop(after=0)
def same_answer_parsed_again(number):
    yield Call("gpt-4o", ["Give the totals as JSON."], "Sure! Here are the totals: 12, 19")


@loop(after=0)
def same_tool_call_asked_for_again(number):
    call_id = "call_" + _uuid(number).replace("-", "")[:24]
    yield Call("gpt-4o", ["Book the room."], {"content": "", "tool_calls": [{"id": call_id, "name": "book", "args": {"room": 4}}]})


@loop(period=2)
def read_and_list_in_turns(number):
    yield Call("read_file", {"path": "config.yaml"}, "debug: true")
    yield Call("list_directory", {"path": "src"}, "app.py\nmodels.py")


@loop(period=2)
def two_agents_that_hand_over_to_each_other(number):
    yield Call("transfer_to_billing", {}, "Transferred to billing", node="support")
    yield Call("transfer_to_support", {}, "Transferred to support", node="billing")


@loop(period=2)
def a_thought_and_a_refused_click(number):
    yield Call("think", "I should click on Buy Now.", "OK.")
    yield Call("click", "Buy Now", "Invalid action!", failed=True)


@loop(period=3)
def insert_build_undo(number):
    yield Call("edit_file", {"path": "a.c", "line": 4, "text": "int x;"}, "The file was changed.")
    yield Call("run_shell", {"command": "make"}, "a.c:4: error: redefinition of 'x'", failed=True)
    yield Call("undo_edit", {"path": "a.c"}, "The last edit was undone.")


@loop(period=5)
def five_queries_round_and_round(number):
    for table in ("orders", "customers", "items", "refunds", "stock"):
        yield Call("sql", {"count": table, "where": "region = 'north'"}, f"[({len(table)},)]")


@loop(period=7)
def seven_pages_round_and_round(number):
    for page in ("home", "shop", "cart", "login", "help", "terms", "home/en"):
        yield Call("open_page", {"url": f"https://shop.example/{page}"}, f"<h1>{page}</h1>")


@loop(period=3)
def three_calls_in_changing_order(number):
    calls = [
        Call("grep", {"pattern": "def total", "path": "src"}, "src/cart.py:88:def total(self):"),
        Call("read_file", {"path": "src/cart.py"}, "class Cart: ..."),
        Call("list_directory", {"path": "src"}, "cart.py"),
    ]
    Random(number).shuffle(calls)  # noqa: S311 - an order, and no secret
    yield from calls


_PROSE = """I will now fix the failing test.|The problem is in the cart module.|Let me think about this.|We should look at it again.|
Next, the total must be rounded.|It seems that the fix works.|Please run the tests.|The issue has been resolved.|Thank you for your help.|
I have completed the task.|Is there anything else?|Goodbye!""".replace("\n", "").split("|")


@loop()
def prose_sent_to_the_shell(number):
    yield Call("bash", _PROSE[number], "bash: syntax error: unterminated quoted string", failed=True)


@loop()
def refused_edits_with_small_changes(number):
    line = 40 + number
    yield Call("edit", {"start": line, "end": line + 2, "text": "return total"}, "Edit refused: unexpected indent.", failed=True)


@loop(period=2)
def new_thoughts_between_the_same_refusals(number):
    yield Call("think", _PROSE[number], "OK.")
    yield Call("search", f"usb cable {_PROSE[-number]}", "Invalid action!", failed=True)


# Healthy runs


@healthy
def polling_until_done():
    yield from _beginning()
    for percent in range(0, 101, 2):
        yield Call("get_job", {"id": 7}, {"state": "running", "progress": f"{percent}%"})
    yield Call("get_job", {"id": 7}, {"state": "done"})


@healthy
def polling_that_waits_a_little_before_it_moves():
    for text in ("queued", "queued", "queued", "running", "running", "running", "running", "done"):
        yield Call("get_build", {"id": 9}, text)


@healthy
def paging_by_number():
    for page in range(1, 60):
        yield Call("list_orders", {"page": page, "size": 50}, {"orders": [{"id": 50 * page + item} for item in range(3)]})


@healthy
def paging_through_empty_pages():
    for offset in range(0, 2_000, 50):
        yield Call("list_orders", {"offset": offset}, [])


@healthy
def paging_without_arguments():
    for page in range(30):
        yield Call("scroll_down", {}, f"({page * 100} lines above)\n" + f"def function_{page}(): ...")


@healthy
def a_batch_over_numbers_where_all_is_ok():
    for item in range(1, 1_001):
        yield Call("send_reminder", {"item": item}, "ok")


@healthy
def a_batch_over_uuids_where_all_is_ok():
    for item in range(300):
        yield Call("delete_user", {"id": _uuid(item)}, {"deleted": True})


@healthy
def a_batch_over_days_where_nothing_is_found():
    for day in range(1, 29):
        yield Call("query_log", {"since": f"2026-02-{day:02}T00:00:00Z", "until": f"2026-02-{day:02}T23:59:59Z"}, [])


@healthy
def a_batch_that_sets_itself_up_again_for_each_item():
    for item in range(100):
        yield Call("sign_in", {"user": "robot"}, "signed in")
        yield Call("get_settings", {}, {"currency": "EUR"})
        yield Call("list_tables", {}, ["orders", "refunds"])
        yield Call("refund", {"order": item}, "ok")


@healthy
def a_batch_in_which_one_in_four_fails_with_the_same_error():
    for item in range(200):
        failed = item % 4 == 3
        yield Call("send_mail", {"to": f"user{item}@example.com"}, "mailbox unavailable" if failed else "sent", failed=failed)


@healthy
def lookups_that_fail_naming_their_item():
    for item in range(200):
        yield Call("get_order", {"order": item}, LookupError(f"order {item} not found"))


@healthy
def lookups_that_answer_not_found():
    for item in range(200):
        yield Call("get_order", {"order": item}, "not found")


@healthy
def parallel_lookups_that_fail_in_the_same_words():
    for item in range(40):
        yield Call("get_order", {"order": item}, LookupError("not found"), began=0)


@healthy
def a_retry_that_succeeds():
    yield from _beginning()
    for _ in range(3):
        yield Call("fetch_rates", {"base": "EUR"}, TimeoutError("timed out"))
    yield Call("fetch_rates", {"base": "EUR"}, {"USD": 1.09})
    yield Call("convert", {"amount": 10}, 10.9)


@healthy
def many_retries_that_succeed():
    for city in ("Oslo", "Rome", "Bonn", "Nice", "Lyon", "Cork"):
        for _ in range(2):
            yield Call("get_weather", {"city": city}, ConnectionError("connection reset"))
        yield Call("get_weather", {"city": city}, f"sunny in {city}")


@healthy
def a_refused_edit_tried_three_times_then_dropped():
    yield from _beginning()
    for _ in range(3):
        yield Call("edit", {"line": 12, "text": "retrun x"}, "Edit refused: invalid syntax", failed=True)
    yield Call("edit", {"line": 12, "text": "return x"}, "The file was changed.")
    yield Call("run_shell", {"command": "pytest -q"}, "17 passed in 0.79s")


@healthy
def tests_run_again_after_each_edit():
    for number in range(12):
        yield Call("edit_file", {"path": "cart.py", "line": 80 + number, "text": f"x = {number}"}, "The file was changed.")
        yield Call("run_shell", {"command": "pytest -q"}, "3 failed, 14 passed", failed=True)


@healthy
def edits_refused_once_each_between_tests():
    for number in range(8):
        yield Call("edit_file", {"old": f"a{number}", "new": "b"}, "No match was found.", failed=True)
        yield Call("run_shell", {"command": "git status"}, "nothing to commit")
        yield Call("edit_file", {"old": f"a{number} ", "new": "b"}, "The file was changed.")
        yield Call("run_shell", {"command": "pytest -q"}, f"{9 - number} failed", failed=True)


@healthy
def tuning_where_only_figures_differ():
    for number in range(20):
        yield Call("train", {"config": "base.yaml"}, f"epoch 5: loss 0.{731 - 7 * number}, accuracy 0.{641 + 5 * number}")


@healthy
def validation_whose_score_creeps():
    for number in range(15):
        yield Call("edit_file", {"path": "model.py", "line": 10, "text": f"lr = {number}e-4"}, "The file was changed.")
        yield Call("validate", {}, {"score": 0.5 + number / 1000})


@healthy
def greetings_of_many_people():
    for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo"):
        yield Call("gpt-4o-mini", ["You are a friendly assistant.", f"Hi, I am {name}!"], "Hello! How can I help you today?")


@healthy
def classification_with_few_answers():
    for number in range(200):
        label = ("spam", "ham", "ham", "unsure")[number % 4]
        yield Call("gpt-4o-mini", ["Classify the mail: spam, ham or unsure.", f"Mail about subject number {number}"], label)


@healthy
def votes_on_one_question():
    for _ in range(20):
        yield Call("gpt-4o", ["How many letters has 'strawberry'?"], "10", began=0)


@healthy
def the_same_look_around_before_each_new_piece_of_work():
    for number in range(10):
        yield Call("read_file", {"path": "TODO.md"}, "- write docs\n- write tests")
        yield Call("list_directory", {"path": "src"}, "app.py")
        yield Call("write_file", {"path": f"docs/part{number}.md", "text": f"Part {number}"}, "written")


@healthy
def a_round_that_a_user_asks_for_twice():
    for _ in range(2):
        for city in ("Oslo", "Rome", "Bonn", "Nice", "Lyon", "Cork"):
            yield Call("get_weather", {"city": city}, "sunny")


@healthy
def a_queue_worked_off_without_arguments():
    for number in range(50):
        yield Call("next_ticket", {}, {"id": 1_000 + number, "subject": "Question"})


@healthy
def an_empty_inbox_looked_at_between_work():
    for number in range(20):
        yield Call("check_inbox", {}, [])
        yield Call("check_inbox", {}, [])
        yield Call("write_report", {"hour": number}, "saved")


@healthy
def searches_with_new_words_and_new_hits():
    for number, words in enumerate(_PROSE):
        yield Call("search_web", {"query": words}, [f"Result {number} for {words}"])


@healthy
def a_shell_used_for_many_things_with_a_few_typing_errors():
    for number in range(10):
        yield Call("bash", f"ls dir{number}", f"file{number}.txt")
        yield Call("bash", f"gti log -{number}", "bash: gti: command not found", failed=True)
