"""Bounds of a call's input: never less than its text can come to, and tight for a history that was priced before."""

from __future__ import annotations

import copy
import json
import math
import threading
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clevagent_core import bounds
from clevagent_core.bounds import (
    CALL_OVERHEAD,
    MESSAGE_OVERHEAD,
    TOOLS_OVERHEAD,
    CalibratedBounds,
    content_bound,
    is_opaque,
    text_bound,
)
from clevagent_core.calls import LLMCall, ToolCall, Usage
from clevagent_core.tickets import Outcome

TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="\ufdfa\ufb2c\u212b\u00c5e\u0301\u1e9b\u0323\u3300 a\U0001f600"),
    st.text(st.characters(categories=["Cs"]), max_size=5),
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)
JSON = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4))
)
MESSAGES = st.one_of(
    st.text(max_size=60),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=60)}),
)
HISTORIES = st.lists(MESSAGES, min_size=1, max_size=5)


def utf8(text):
    return len(text.encode("utf-8", "surrogatepass"))


def call(items, *, model="m", tools=()):
    return LLMCall(model=model, input=items, tools=tools)


def by_bytes(items, tools=()):
    """What nobody has reported anything of: all of its bytes."""
    beside = TOOLS_OVERHEAD + sum(content_bound(schema) for schema in tools) if tools else 0
    return CALL_OVERHEAD + sum(content_bound(item) + MESSAGE_OVERHEAD for item in items) + beside


def settle(provider, made, tokens):
    provider.clevagent_call_settled(None, made, Outcome("settled", Usage(input_tokens=tokens), 0))


def learn(provider, items, tokens, **fields):
    made = call(items, **fields)
    provider.clevagent_bound(made)
    settle(provider, made, tokens)


# -- bytes ------------------------------------------------------------------------------------------------------------------


@given(TEXTS)
def test_a_text_is_bounded_by_its_bytes_raw_and_normalised(text):
    for form in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFKC", text)):
        assert text_bound(text) >= utf8(form)


def test_a_character_that_normalising_makes_many_counts_as_all_of_them():
    assert text_bound("\ufdfa") == utf8(unicodedata.normalize("NFKC", "\ufdfa")) > utf8("\ufdfa")


@pytest.mark.slow
@given(JSON)
@example(math.inf)
@example([-math.inf, {"x": math.inf}])
def test_a_nesting_is_bounded_by_the_bytes_of_its_json(content):
    for separators in ((",", ":"), (", ", ": ")):
        sent = json.dumps(content, ensure_ascii=False, separators=separators)
        # A text that is sent by itself stands without quotes.
        quotes = 2 if isinstance(content, str) else 0
        if not isinstance(content, str):
            assert content_bound(content) >= utf8(sent) - quotes
    if isinstance(content, str):
        assert content_bound(content) >= utf8(content)


@pytest.mark.slow
@given(JSON)
def test_a_nesting_is_bounded_by_its_texts_normalised(content):
    sent = unicodedata.normalize("NFKC", json.dumps(content, ensure_ascii=False))
    if not isinstance(content, str):
        assert content_bound(content) >= utf8(sent)


@pytest.mark.slow
@given(HISTORIES)
def test_the_bound_of_a_new_history_is_never_below_its_bytes(items):
    assert CalibratedBounds().clevagent_bound(call(items)) >= sum(
        utf8(item if isinstance(item, str) else item["role"] + item["content"]) for item in items
    )


def test_tools_are_counted_beside_the_messages():
    schema = {"name": "search", "description": "x" * 100}
    assert (
        CalibratedBounds().clevagent_bound(call(["hello"], tools=[schema])) == by_bytes(["hello"], [schema]) > TOOLS_OVERHEAD + 100
    )


def test_what_cannot_be_bounded_is_left_to_the_context_window():
    assert CalibratedBounds().clevagent_bound(LLMCall(model="m", input=["hello"], opaque=True)) is None


@pytest.mark.parametrize(
    "content",
    [
        "text",
        None,
        {"role": "user", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "look at image_url"}]},
        {"type": "tool_use", "name": "fetch", "input": {"url": "https://example.org", "data": "x"}},
        {"type": "thinking", "thinking": "hm", "signature": "aGk="},
        {"type": "redacted_thinking", "data": "aGk="},
    ],
)
def test_text_is_not_opaque(content):
    assert not is_opaque(content)


@pytest.mark.parametrize(
    "content", [b"png", [b"png"], {"type": "image", "url": "x"}, ({"content": [{"type": "file", "file": {}}]},)]
)
def test_what_is_no_text_is_opaque(content):
    assert is_opaque(content)


# -- what was reported ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(HISTORIES, st.lists(MESSAGES, max_size=3), st.integers(1, 10**6))
def test_after_a_report_only_what_is_new_counts_by_its_bytes(items, new, tokens):
    provider = CalibratedBounds()
    learn(provider, items, tokens)
    expected = tokens + sum(content_bound(item) + MESSAGE_OVERHEAD for item in new)
    assert provider.clevagent_bound(call([*items, *new])) == expected


@pytest.mark.slow
@given(HISTORIES, st.lists(MESSAGES, max_size=3), st.integers(1, 10**6))
def test_histories_that_are_equal_but_not_identical_are_known_again(items, new, tokens):
    provider = CalibratedBounds()
    learn(provider, items, tokens)
    again = json.loads(json.dumps([*items, *new]))
    assert provider.clevagent_bound(call(again)) == tokens + sum(content_bound(item) + MESSAGE_OVERHEAD for item in new)


@pytest.mark.slow
@given(HISTORIES, st.lists(MESSAGES, min_size=1, max_size=3), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_latest_report_of_a_growing_history_counts(items, new, first, second):
    provider = CalibratedBounds()
    learn(provider, items, first)
    learn(provider, [*items, *new], second)
    assert provider.clevagent_bound(call([*items, *new, "more"])) == second + 4 + MESSAGE_OVERHEAD


@pytest.mark.slow
@given(HISTORIES, st.data(), st.integers(1, 10**6))
def test_an_edited_history_counts_by_all_its_bytes(items, data, tokens):
    provider = CalibratedBounds()
    learn(provider, items, tokens)
    edited = copy.deepcopy(items)
    index = data.draw(st.integers(0, len(items) - 1))
    edited[index] = data.draw(MESSAGES.filter(lambda message: message != items[index]))
    assert provider.clevagent_bound(call(edited)) == by_bytes(edited)


@pytest.mark.slow
@given(HISTORIES, st.integers(1, 10**6))
def test_a_shortened_history_counts_by_all_its_bytes(items, tokens):
    provider = CalibratedBounds()
    learn(provider, ["first", *items], tokens)
    assert provider.clevagent_bound(call(["first", *items][:-1])) == by_bytes(["first", *items][:-1])


def test_a_message_that_is_edited_in_place_is_not_the_one_that_was_counted():
    provider, message = CalibratedBounds(), {"role": "user", "content": "hello"}
    learn(provider, [message], 5)
    message["content"] = "x" * 1000
    assert provider.clevagent_bound(call([message])) == by_bytes([message])


def test_a_block_deep_in_a_message_that_is_edited_in_place_is_not_the_one_that_was_counted():
    provider, message = CalibratedBounds(), {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    learn(provider, [message], 5)
    message["content"][0]["text"] = "x" * 1000
    assert provider.clevagent_bound(call([message])) == by_bytes([message])


def test_a_text_below_many_lists_that_is_edited_in_place_is_not_the_one_that_was_counted():
    provider, inner = CalibratedBounds(), ["hello"]
    message = inner
    for _ in range(20):
        message = [message]
    learn(provider, [message], 5)
    inner[0] = "x" * 1000
    assert provider.clevagent_bound(call([message])) == by_bytes([message])


def test_a_text_of_a_class_that_cannot_be_copied_has_a_bound():
    """Some frameworks keep more in a text than its characters."""

    class Traced(str):
        __slots__ = ("source",)

        def __new__(cls, text, source):
            made = super().__new__(cls, text)
            made.source = source
            return made

    provider, text = CalibratedBounds(), Traced("hello", threading.Lock())
    learn(provider, [text], 5)
    assert provider.clevagent_bound(call([text, "more"])) == 5 + content_bound("more") + MESSAGE_OVERHEAD


def test_a_message_that_lies_in_itself_has_a_bound():
    """Nothing of that kind can be sent; whoever tries hears it from the provider, not from here."""
    provider, message = CalibratedBounds(), ["hello"]
    message.append(message)
    assert provider.clevagent_bound(call([message])) == by_bytes([message])


def test_a_message_that_is_edited_while_its_call_is_in_flight_is_not_the_one_that_was_counted():
    provider, message = CalibratedBounds(), {"role": "user", "content": "hello"}
    made = call([message])
    provider.clevagent_bound(made)
    message["content"] = "x" * 1000
    settle(provider, made, 5)
    assert provider.clevagent_bound(call([message])) == by_bytes([message])


def test_a_schema_that_is_edited_in_place_is_not_the_one_that_was_counted():
    provider, schema = CalibratedBounds(), {"name": "search"}
    learn(provider, ["hello"], 5, tools=[schema])
    schema["description"] = "x" * 1000
    assert provider.clevagent_bound(call(["hello"], tools=[schema])) == by_bytes(["hello"], [schema])


@pytest.mark.parametrize("tools", [[], [{"name": "other"}], [{"name": "search"}, {"name": "other"}]])
def test_a_report_with_other_tools_does_not_count(tools):
    provider = CalibratedBounds()
    learn(provider, ["hello"], 5, tools=[{"name": "search"}])
    assert provider.clevagent_bound(call(["hello"], tools=tools)) == by_bytes(["hello"], tools)


def test_a_report_without_tools_does_not_count_for_a_call_with_them():
    provider = CalibratedBounds()
    learn(provider, ["hello"], 5)
    assert provider.clevagent_bound(call(["hello"], tools=[{"name": "search"}])) == by_bytes(["hello"], [{"name": "search"}])


@pytest.mark.slow
@given(HISTORIES)
def test_a_report_of_another_model_does_not_count(items):
    provider = CalibratedBounds()
    learn(provider, items, 1, model="small")
    assert provider.clevagent_bound(call(items, model="large")) == by_bytes(items)


def test_conversations_that_begin_alike_do_not_mix():
    provider = CalibratedBounds()
    learn(provider, ["system", "question a"], 50)
    learn(provider, ["system", "question b"], 70)
    assert provider.clevagent_bound(call(["system", "question a", "x"])) == 50 + 1 + MESSAGE_OVERHEAD
    assert provider.clevagent_bound(call(["system", "question b", "x"])) == 70 + 1 + MESSAGE_OVERHEAD


def test_conversations_of_dicts_that_begin_alike_are_all_remembered():
    provider = CalibratedBounds()
    histories = [[{"role": "user", "content": f"question {letter}"}] for letter in "ab"]
    for tokens, items in enumerate(histories, 50):
        learn(provider, items, tokens)
    assert [provider.clevagent_bound(call(items)) for items in histories] == [50, 51]


@pytest.mark.parametrize("outcome", [Outcome("charged", None, 5), Outcome("released", None, 0), Outcome("settled", Usage(), 0)])
def test_what_reports_no_input_teaches_nothing(outcome):
    provider, made = CalibratedBounds(), call(["hello"])
    provider.clevagent_bound(made)
    provider.clevagent_call_settled(None, made, outcome)
    assert provider.clevagent_bound(call(["hello"])) == by_bytes(["hello"])


def test_tool_calls_teach_nothing():
    CalibratedBounds().clevagent_call_settled(None, ToolCall(tool="search"), Outcome("settled", Usage(), None))


def test_a_bounded_number_of_conversations_is_remembered(monkeypatch):
    monkeypatch.setattr(bounds, "_CONVERSATIONS", 3)
    provider = CalibratedBounds()
    for number in range(10):
        learn(provider, [f"question {number}"], 1)
    assert [provider.clevagent_bound(call([f"question {number}"])) == 1 for number in range(10)] == [False] * 7 + [True] * 3


def test_a_growing_conversation_is_remembered_once():
    provider = CalibratedBounds()
    items = ["system", "question"]
    for number in range(100):
        items = [*items, f"message {number}"]
        learn(provider, items, number + 1)
    assert len(provider._known) == 1
