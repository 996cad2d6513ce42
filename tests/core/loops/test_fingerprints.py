"""Fingerprints: what counts as the same, what does not, and that nothing can break them."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import json
import sys
import threading
import uuid

import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clevagent_core.guards.fingerprints import arguments_of, message_of, result_of

EITHER = pytest.mark.parametrize("of", [arguments_of, result_of])


@EITHER
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}),
        ("one  two\n", " one two"),
        ({"a": "one\ttwo"}, {"a": "one two "}),
        ('{"b":2, "a": [1,2]}', {"a": [1, 2], "b": 2}),
        ('{"a": 1}', '{\n  "a": 1\n}'),
        ({"a": '{"x": 1}'}, {"a": {"x": 1}}),
        ([1, 2], (1, 2)),
        (1.0, 1),
        ({"a", "b"}, frozenset({"b", "a"})),
        (collections.OrderedDict(a=1, b=2), {"b": 2, "a": 1}),
        (float("nan"), float("nan")),
    ],
)
def test_what_differs_in_spelling_only_is_the_same(of, one, other):
    assert of(one) == of(other)


class _Colour(enum.Enum):
    RED = 1
    BLUE = 2


class _Plain:
    def __init__(self, value):
        self.value = value


@dataclasses.dataclass(slots=True)
class _Slotted:
    value: object


@dataclasses.dataclass
class _Data:
    value: object


class _Model(pydantic.BaseModel):
    value: object
    other: str = "x"


class _Extra(pydantic.BaseModel, extra="allow"):
    pass


@EITHER
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        ("ab", "a b"),
        ("1", 1),
        (1, 2),
        (-1, -2),
        (1.5, 2.5),
        (2**61, 1),
        ([10**5_000], [10**5_000 + 1]),
        (True, 1),
        (False, 0),
        (None, ""),
        (None, "None"),
        ({}, []),
        ([], ""),
        ([[1], 2], [1, [2]]),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 2}),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({1: "a"}, {2: "a"}),
        ([1], [1, 1]),
        (b"a", b"b"),
        (bytearray(b"a"), bytearray(b"b")),
        ({1}, {2}),
        (_Colour.RED, _Colour.BLUE),
        (decimal.Decimal("1.1"), decimal.Decimal("1.2")),
        (dt.date(2026, 1, 1), dt.date(2026, 1, 2)),
        (uuid.UUID(int=1), uuid.UUID(int=2)),
        (range(3), range(4)),
        (_Plain(1), _Plain(2)),
        (_Slotted(1), _Slotted(2)),
        (_Data(1), _Data(2)),
        (_Model(value=1), _Model(value=2)),
        (_Extra(value=1), _Extra(value=2)),
        (_Data(1), _Plain(1)),
        (ValueError("a"), ValueError("b")),
        (ValueError("a"), KeyError("a")),
        (ValueError("a"), "a"),
        ("x" * 100_000, "x" * 100_001),
        ("x" * 50_000 + "a" + "x" * 50_000, "x" * 50_000 + "b" + "x" * 50_000),
        ([{"text": "x" * 5_000}] * 99 + [{"text": "a"}], [{"text": "x" * 5_000}] * 99 + [{"text": "b"}]),
        (list(range(5_000)), [*range(2_500), -1, *range(2_501, 5_000)]),
        (int, str),
        (len, print),
    ],
)
def test_what_differs_in_content_is_not_the_same(of, one, other):
    assert of(one)[0] != of(other)[0]


@EITHER
@pytest.mark.parametrize("made", [_Plain, _Slotted, _Data, lambda value: _Model(value=value), ValueError, lambda value: {value}])
def test_objects_with_the_same_content_are_the_same(of, made):
    assert of(made("a")) == of(made("a"))


def test_a_default_that_is_given_is_the_same_as_one_that_is_not():
    assert arguments_of(_Model(value=1)) == arguments_of(_Model(value=1, other="x"))


@pytest.mark.parametrize("made", [object, asyncio.Lock, threading.Lock, lambda: lambda: None, lambda: iter([])])
def test_no_memory_address_is_in_it(made):
    one, other = made(), made()
    assert result_of(one) == result_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"q": "x", "attempt": 1}, {"q": "x", "attempt": 2}),
        ({"q": "x"}, {"q": "x", "retry_count": 1}),
        ({"seq": 1, "ts": 1}, {"seq": 2, "ts": 2}),
        ({"q": "x", "requestId": "a"}, {"q": "x", "requestId": "b"}),
        ({"q": "x", "request_id": str(uuid.UUID(int=1))}, {"q": "x", "request_id": str(uuid.UUID(int=2))}),
        ({"q": "x", "meta": {"X-Request-ID".lower(): 1, "nonce": "af"}}, {"q": "x", "meta": {"x-request-id": 1, "nonce": "ce"}}),
        ({"q": "x", "timestamp": 1_769_854_507}, {"q": "x", "timestamp": 1_769_854_508}),
        ('{"q": "x", "ts": 1}', '{"ts": 2, "q": "x"}'),
        ("Fix it (attempt 2 of 5)", "Fix it (attempt 3 of 5)"),
        ("/stock?sku=7&ts=1769854507", "/stock?sku=7&ts=1769854999"),
        ("Current time: 2026-01-31 10:15:07\nGo on.", "Current time: 2026-01-31 10:16:44\nGo on."),
        ("Current date: 2026-01-31. Go on.", "Current date: 2026-02-01. Go on."),
        ("trace_id=4bf92f3577b34da6 read", "trace_id=00f067aa0ba902b7 read"),
        ({"id": "call_abcdefghijklmnopqrstuvw1"}, {"id": "call_abcdefghijklmnopqrstuvw2"}),
        ({"id": "toolu_01A09q90qw90lq917835lq9"}, {"id": "toolu_01B09q90qw90lq917835lq9"}),
    ],
)
def test_the_shape_of_arguments_leaves_out_what_labels_or_counts_the_request(one, other):
    assert arguments_of(one)[1] == arguments_of(other)[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"request_id": 17}, {"request_id": 18}),
        ("Approve request id 17", "Approve request id 18"),
        ({"page": 1}, {"page": 2}),
        ({"offset": 0}, {"offset": 50}),
        ({"item": 1}, {"item": 2}),
        ({"id": str(uuid.UUID(int=1))}, {"id": str(uuid.UUID(int=2))}),
        ({"order_id": "A-1"}, {"order_id": "A-2"}),
        ({"since": "2026-01-01T00:00:00Z"}, {"since": "2026-01-02T00:00:00Z"}),
        ({"day": dt.date(2026, 1, 1)}, {"day": dt.date(2026, 1, 2)}),
        ("git show 1f3c9e2b7a", "git show 9f3c9e2b7a"),
        ("Read page 3", "Read page 4"),
        ("/orders?page=3&ts=1", "/orders?page=4&ts=1"),
        ("Fix it (attempt 2)", "Mend it (attempt 2)"),
        ({"id": "call_7"}, {"id": "call_8"}),
        ("a" * 100_000 + "1", "a" * 100_000 + "2"),
    ],
)
def test_the_shape_of_arguments_keeps_what_tells_the_items_of_a_batch_apart(one, other):
    assert arguments_of(one)[1] != arguments_of(other)[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"500 (request {uuid.UUID(int=1 << 90)})", f"500 (request {uuid.UUID(int=5 << 91)})"),
        ("bash: line 9: foo: not found", "bash: line 12: foo: not found"),
        ("at 2026-01-31T10:15:07Z", "at 2027-02-11T11:25:37.123Z"),
        ("at 2026-01-31 10:15:07+00:00", "at 2026-02-28 10:16:07+00:00"),
        ("<Job at 0x7f3a1b>", "<Job at 0x7fbb1bcc>"),
        ("commit 1f3c9e2b7a", "commit 9f3c9e2b7a0"),
        ("ulid 01ARZ3NDEKTSV4RRFFQ69G5FAV", "ulid 01BRZ3NDEKTSV4RRFFQ69G5FAW"),
        ("req_9f8a7b6c5d failed", "req_1f8a7b6c5e failed"),
        ("took 1.23 s", "took 45 s"),
        ({"n": 1, "ts": "a"}, {"n": 2, "ts": "b"}),
        (ConnectionError("line 3"), ConnectionError("line 4")),
        (uuid.UUID(int=1), uuid.UUID(int=2)),
        ("line 4: " + "x" * 20_000, "line 5: " + "x" * 20_000),
    ],
)
def test_the_shape_of_results_leaves_out_ids_times_and_numbers(one, other):
    assert result_of(one)[0] != result_of(other)[0]
    assert result_of(one)[1] == result_of(other)[1]


@pytest.mark.parametrize("value", ["took 1.23 s", {"n": 1, "ts": [2]}, ValueError("line 3"), "x1" * 9_000, uuid.UUID(int=1), None])
def test_without_a_failure_the_shape_of_a_result_is_not_worked_out(value):
    exact, shape = result_of(value, failed=False)
    assert exact == result_of(value)[0]
    # Parts that are left out of a shape (labels) may be left out still: nothing compares it.
    assert shape == result_of(value, failed=False)[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [("foo: not found", "bar: not found"), (ValueError("a"), TypeError("a")), ({"a": 1}, {"b": 1}), ("added", "decade")],
)
def test_the_shape_of_results_keeps_words(one, other):
    assert result_of(one)[1] != result_of(other)[1]


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(st.characters(codec="utf-8", categories=("L", "N"))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_anything = st.recursive(
    _scalars | st.decimals() | st.datetimes() | st.uuids() | st.builds(object) | st.builds(ValueError, st.text()) | st.functions(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(_scalars, inner, max_size=4)
        | st.builds(_Plain, inner)
        | st.builds(_Slotted, inner)
        | st.builds(RuntimeError, inner)
    ),
    max_leaves=12,
)


def _reordered(value):
    if isinstance(value, dict):
        return {key: _reordered(value[key]) for key in reversed(value)}
    return [_reordered(part) for part in value] if isinstance(value, list) else value


@pytest.mark.slow
@given(_json, st.none() | st.integers(0, 4))
def test_neither_key_order_nor_the_white_space_of_json_matters(value, indent):
    assert arguments_of(value) == arguments_of(_reordered(value))
    assert result_of(value) == result_of(_reordered(value))
    if isinstance(value, (dict, list)):
        assert arguments_of(json.dumps(value, indent=indent)) == arguments_of(value)
        assert result_of(json.dumps(_reordered(value), indent=indent)) == result_of(value)


@pytest.mark.slow
@given(st.lists(st.text(st.characters(categories=("L",)), min_size=1)), st.lists(st.sampled_from([" ", "\n", "\t ", "  "])))
def test_no_white_space_between_words_matters(words, spaces):
    spread = "".join(word + (spaces[number % len(spaces)] if spaces else " ") for number, word in enumerate(words))
    assert arguments_of(spread) == arguments_of(" ".join(words))
    assert result_of(spread) == result_of(" ".join(words))


@pytest.mark.slow
@given(_anything)
def test_nothing_raises_and_the_same_value_has_the_same_fingerprint(value):
    for of in (arguments_of, result_of):
        exact, shape = of(value)
        assert type(exact) is type(shape) is int
        assert of(value) == (exact, shape)


@pytest.mark.slow
@given(st.lists(_json, max_size=5), st.lists(_json, max_size=5))
@example([0], [""])
def test_different_content_has_different_fingerprints(one, other):
    if json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True):
        assert arguments_of(one)[0] != arguments_of(other)[0]
        assert result_of(one)[0] != result_of(other)[0]


class _Hostile:
    """Does the worst in whatever it is asked."""

    def _refuse(self, *_, **__):
        raise SystemExit("this was called")

    __repr__ = __str__ = __eq__ = __hash__ = __len__ = __iter__ = __bool__ = __getattribute__ = __reduce__ = __format__ = _refuse


class _HostileText(str):
    __slots__ = ()

    def __hash__(self):
        raise SystemExit("this was called")

    __str__ = __len__ = __iter__ = __eq__ = split = __hash__


class _HostileMapping(dict):
    def items(self):
        raise SystemExit("this was called")

    __iter__ = __len__ = keys = __getitem__ = items


class _HostileError(Exception):
    def __str__(self):
        raise SystemExit("this was called")

    __repr__ = __str__


@EITHER
@pytest.mark.parametrize(
    "made",
    [_Hostile, lambda: _HostileText("a"), lambda: _HostileMapping(a=1), lambda: _HostileError("a"), lambda: _Plain(_Hostile())],
    ids=["object", "text", "mapping", "error", "inside"],
)
def test_no_code_of_the_value_is_run(of, made):
    value = made()
    assert of(value) == of(value)
    assert of({"a": value, "b": 1})[0] != of({"a": value, "b": 2})[0]


def test_a_subclass_counts_as_what_it_holds():
    assert result_of(_HostileText("a")) == result_of("a")
    assert result_of(_HostileMapping(a=1)) == result_of({"a": 1})


def test_an_iterator_is_not_consumed():
    numbers = iter([1, 2, 3])
    result_of({"numbers": numbers})
    assert list(numbers) == [1, 2, 3]


@EITHER
def test_what_holds_itself_has_a_fingerprint(of):
    row: list[object] = []
    row += [row, row, {"row": row}]
    thing = _Plain(None)
    thing.value = [thing, thing]
    assert of(row) == of(row)
    assert of(thing) == of(thing)


@EITHER
def test_a_nesting_deeper_than_the_stack_has_a_fingerprint(of):
    deep: object = "x"
    for _ in range(10 * sys.getrecursionlimit()):
        deep = [deep]
    assert of(deep) == of(deep)
    assert of("[" * 4_000 + "]" * 4_000) == of("[" * 4_000 + "]" * 4_000)


class _Text(str):
    """A text that takes no short cut."""

    __slots__ = ()


def _without_short_cuts(value):
    if isinstance(value, str):
        return _Text(value)
    return type(value)(map(_without_short_cuts, value)) if isinstance(value, (list, tuple)) else value


TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "", " ", "\u00a0", "a  b", "a\n b\t", " x ", "{", "{}", "[1, 2]", '{"id": "call_7", "type": "tool_use"}', "{a}", "attempt 3 of 5",
            "call_AbCdEfGhIjKlMnOpQrStUv12", " call_AbCdEfGhIjKlMnOpQrStUv12 ", "٣ apples", "ts=17 now", "nothing new", "nothing  new",
            "x" * 8192, "x" * 8193, "retry 7 " + "y" * 3000 + " retry 8", "9" * 70,
        ]
    ),
)  # fmt: skip
PARTS = st.one_of(TEXTS, st.lists(TEXTS, max_size=5).map(tuple), st.none(), st.integers(), st.lists(TEXTS, max_size=2))
MESSAGES = st.one_of(PARTS, st.lists(PARTS, max_size=6), st.lists(PARTS, max_size=6).map(tuple))


@pytest.mark.slow
@given(MESSAGES)
@example(("a", ("b", ("c", "d"))))
@example(["x" * 8192] * 4)
@example([("9 " * 4096,) * 4] * 4)
def test_plain_text_takes_a_short_cut_to_the_same_shape(message):
    """Most messages are text; what a walk would find in them is found without one."""
    assert message_of(message) == message_of(_without_short_cuts(message))


@pytest.mark.slow
def test_a_nesting_of_any_depth_has_a_shape():
    """It never raises, however deep a message is."""
    deep = "end"
    for _ in range(100_000):
        deep = (deep,)
    assert isinstance(message_of(deep), int)
