"""Fingerprints of what a call was given and of what it brought, so that two of them can be compared without keeping either.

Each value gets two: one that is exact, up to key order and white space, and a *shape*. The shapes of arguments and of results leave
out different things, as they answer different questions:

* Of arguments: was the same thing asked for? Left out is what labels or counts the *request*: what stands under ``request_id``,
  ``timestamp``, ``attempt``, ``nonce`` and the like, as a key or before a value in text. A bare id, date or number stays, however
  plainly it is one: ``delete(id=...)`` over a thousand UUIDs is a batch, even where each answer is "ok", and so is a search
  through the days of a year.
* Of results: is it the same answer but for its details? Left out are ids, times and all numbers. Too coarse for anything
  but failures: a progress bar would stand still.

Ids that providers make up for each tool call are in neither, nor in the exact ones.

No method of the value's own class is called, no ``repr`` read (it may hold a memory address), no iterator consumed, and nothing
raises. Work is bounded: at most ``_PARTS`` parts are looked at, of a long list its ends, and a text above ``_TEXT`` characters is
hashed as it is. What cannot be looked into counts by its type. Fingerprints hold within one process: they rest on ``hash``,
which is seeded for each. Safe to use from any thread.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import fractions
import functools
import itertools
import json
import pathlib
import re
import types
import uuid
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

from clevagent_core.interrupts import is_interrupt

_hash: Callable[[Hashable], int] = hash
"""What makes a number of strings, bytes and tuples of such numbers: the one thing to exchange for lasting fingerprints."""

_PARTS: Final = 16_384
"""How many parts of one value are looked at; what comes after them counts by its type and size."""
_ENDS: Final = 4_096
"""How many items of a long list or mapping are looked at, at each of its ends."""
_CHARACTERS: Final = 131_072
"""How many characters of one value are freed of white space and details; texts after them are hashed as they are."""
_DEPTH: Final = 32
"""How deep a nesting is looked into."""
_TEXT: Final = 8_192
"""Above this many characters only what is cheap is done to a text: its white space counts, and JSON in it is text."""
_BUFFER: Final = 1 << 20
"""Above this many bytes only the ends of a buffer are looked at."""
_EDGE: Final = 1_024
"""How many characters at each end of a text are searched for what a shape leaves out."""

_LABELS: Final = frozenset(
    {
        "attempt", "attempts", "attemptnumber", "attemptno", "callid", "clientrequestid", "correlationid", "currentdate",
        "currentdatetime", "currenttime", "idempotencykey", "nonce", "now", "requestid", "retries", "retry", "retrycount",
        "retrynumber", "seq", "seqno", "sequencenumber", "spanid", "timestamp", "timestampms", "toolcallid", "tooluseid", "traceid",
        "traceparent", "ts",
    }
)  # fmt: skip
"""Keys, in lower case and without ``_`` and ``-``, whose values label or count a request."""
_LABELLED = re.compile(
    r"""\b( attempt | retry | trace[ _-]?id | correlation[ _-]?id | nonce | timestamp | ts (?==)
          | current[ _-](?: datetime | date | time ) )
        ( ["']? \s? (?: is | [:=#] | number | no\. )? \s? ["']? )
        (?= [\w-]* \d ) [\w-]+ (?: [ ]? \d\d : \d\d [\w:.+-]* | [:.] \d [\w:.+-]* )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""The same in text: ``attempt 3``, ``?ts=1700000000``, ``Current time: 2026-01-31 10:15:07``."""
_LABEL_WORDS: Final = ("attempt", "retry", "trace", "correlation", "nonce", "timestamp", "ts=", "current")
"""Without one of them there is nothing to look for: most texts have none, and this costs a twentieth."""
_CALL_ID = re.compile(
    r"""(?: (?:call|toolu|fc)_ (?:vrtx_|bdrk_)? | chatcmpl- (?:tool-)? ) (?=[A-Za-z]*\d) [A-Za-z0-9]{20,48}
        | tooluse_ (?=[A-Za-z_-]*\d) [A-Za-z0-9_-]{22} | (?:lc_)?run--?[0-9a-f-]{36}(?:-\d+)? | lc_[0-9a-f-]{36}
    """,
    re.VERBOSE,
)
"""Ids that providers and frameworks make up for calls, messages and their blocks: ``call_9Xb2...``, ``toolu_01A...``,
``run--7f31...``, ``lc_7f31...``."""
_ID_LENGTHS: Final = range(25, 64)
"""How many characters such an id has, with white space around it: looked at first, as most texts are longer or shorter."""
_DETAIL = re.compile(r"\b[^\W\d]*+\d\w*(?:[-+.,:/]\w+)*")
"""Any word with a digit in it, and what is joined to it: numbers, dates, times, addresses, UUIDs, digests, ids of requests."""
_DIGIT = re.compile(r"\d")

_REFERS: Final = frozenset({"args", "arguments", "function", "input"})
"""Keys of which one stands in each tool call that a model asked for, in whatever format."""
_SHORT_ID: Final = 4
"""No longer ids, as of models that count their calls, are the same in each round, and may stand for anything else."""
_BLOCKS: Final = frozenset({"function_call", "message", "output_text", "reasoning", "text", "thinking", "tool_call", "tool_use"})
"""Types of what a model wrote, whose ids the provider made up. A file's id is none of them: it stands for the file."""

_Pair = tuple[int, int]


def _constant(name: str) -> _Pair:
    number = _hash(("constant", name))
    return number, number


_NONE: Final = _constant("none")
_TRUE: Final = _constant("true")
_FALSE: Final = _constant("false")
_OMITTED: Final = _constant("omitted")
_UNKNOWN: Final = _constant("unknown")
_A_NUMBER: Final = _hash("#")

_PLAIN: Final = frozenset(
    {
        dt.date, dt.datetime, dt.time, dt.timedelta, dt.timezone, decimal.Decimal, fractions.Fraction,
        uuid.UUID, complex, range, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath,
    }
)  # fmt: skip
"""Types of the standard library whose ``hash`` tells their content."""
_NAMED: Final = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


def arguments_of(value: object) -> tuple[int, int]:
    """Fingerprint what a call is given: exact, and without what labels or counts the request. Takes anything, never raises."""
    return _Arguments().fingerprint(value)


def message_of(value: object) -> int:
    """Give the shape of what a model is sent, or answers: as of arguments, and without the ids of its tool calls and blocks.

    Providers make those up for each answer, in any form; the tool's result names the same id again. Takes anything, never raises.
    """
    shape = _plain_shape(value)
    return _Message().fingerprint(value)[1] if shape is None else shape


def _plain_shape(value: object, *, is_part: bool = False) -> int | None:
    """Return the shape that a walk would find, of text and of a few texts side by side; ``None`` for anything else.

    That is most of what is sent: messages of a person, results of tools. A part of a part is left to the walk, which is bounded.
    """
    kind = type(value)
    if kind is str:
        return _text_shape(value)  # type: ignore[arg-type]  # mypy does not narrow by the type
    if kind is not tuple and (is_part or kind is not list):
        return None
    parts: Sequence[object] = value  # type: ignore[assignment]  # one of these
    if len(parts) > _SIDE_BY_SIDE:
        return None
    shapes = []
    for part in parts:
        if type(part) is str:
            shape = _text_shape(part)
        elif is_part:
            return None
        else:
            shape = _plain_shape(part, is_part=True)
        if shape is None:
            return None
        shapes.append(shape)
    return _hash(("sequence", len(shapes), tuple(shapes)))


def _text_shape(text: str) -> int | None:
    """Return the shape of a text; ``None`` where it is long, or may be JSON."""
    length = len(text)
    if length > _TEXT:
        return None
    text = _collapsed(text)
    if text[:1] in _OPENS and text[-1:] in _CLOSES:
        return None
    if length in _ID_LENGTHS and " " not in text and _CALL_ID.fullmatch(text):
        return _OMITTED[1]
    if _has_digit(text):
        return _hash(_unlabelled(text)) if len(text) <= 2 * _EDGE else _unlabelled_at_ends(text)
    return _hash(text)


_SIDE_BY_SIDE: Final = 4
"""Of so many messages of so many texts, none reaches a limit of a walk: 16 times ``_TEXT`` is ``_CHARACTERS``."""


def _collapsed(text: str) -> str:
    """Return ``text`` with one space for any white space."""
    if "  " not in text and text.isprintable():
        return text.strip(" ")  # no other white space can be printed
    return " ".join(text.split())


def _has_digit(text: str) -> bool:
    if text.isascii():  # ten searches for one character take a fifth of the time that a regular expression takes
        return (
            "1" in text or "0" in text or "2" in text or "3" in text or "4" in text
            or "5" in text or "6" in text or "7" in text or "8" in text or "9" in text
        )  # fmt: skip
    return _DIGIT.search(text) is not None


def _unlabelled(text: str) -> str:
    lowered = text.lower()
    for word in _LABEL_WORDS:
        if word in lowered:
            return _LABELLED.sub(r"\1\2#", text)
    return text


def _unlabelled_at_ends(text: str) -> int:
    return _hash((_unlabelled(text[:_EDGE]), text[_EDGE:-_EDGE], _unlabelled(text[-_EDGE:])))


def result_of(value: object, *, failed: bool = True) -> tuple[int, int]:
    """Fingerprint what a call brought, or the exception that ended it: exact, and without ids, times and numbers.

    Of a call that did not fail nothing compares the shape. With ``failed=False`` the exact fingerprint stands in for it, which saves
    most of the work. Takes anything, never raises.
    """
    return (_Result if failed else _Exact)().fingerprint(value)


class _Walk:
    """One walk through one value. Subclasses settle what a shape leaves out."""

    __slots__ = ("_characters", "_parts")

    def __init__(self) -> None:
        self._parts = _PARTS
        self._characters = _CHARACTERS

    def fingerprint(self, value: object) -> _Pair:
        """Fingerprint ``value``; what cannot be read counts by its type."""
        try:
            return self._any(value, 0)
        except Exception as error:  # whatever is wrong with it: fingerprints are taken on the way of the user's own calls
            if is_interrupt(error):
                raise
            return _opaque(value)

    def _text(self, text: str, depth: int) -> _Pair:
        length = len(text)
        self._characters -= length if length <= _TEXT else 2 * _EDGE
        if self._characters < 0:
            exact = _hash(text)
            return exact, exact
        if length > _TEXT:
            exact = _hash(text)
            return exact, self._shape(text, exact)
        collapsed = _collapsed(text)
        if collapsed[:1] in _OPENS and collapsed[-1:] in _CLOSES:
            # What a model wrote as its arguments, not yet parsed.
            try:
                return self._any(json.loads(text), depth)
            except (ValueError, RecursionError):
                pass  # text that only looks like JSON
        if length in _ID_LENGTHS and " " not in collapsed and _CALL_ID.fullmatch(collapsed):
            return _OMITTED
        exact = _hash(collapsed)
        return exact, self._shape(collapsed, exact)

    def _shape(self, text: str, exact: int) -> int:
        if not _has_digit(text):
            return exact
        return _hash(self._scrubbed(text)) if len(text) <= 2 * _EDGE else self._long_shape(text)

    def _long_shape(self, text: str) -> int:
        raise NotImplementedError

    def _scrubbed(self, text: str) -> str:
        raise NotImplementedError

    def _number(self, value: float) -> _Pair:
        raise NotImplementedError

    def _any(self, value: object, depth: int) -> _Pair:
        self._parts -= 1
        kind = type(value)
        if kind is str:
            return self._text(value, depth)  # type: ignore[arg-type]  # mypy does not narrow by the type
        if value is None:
            return _NONE
        if value is True:
            return _TRUE
        if value is False:
            return _FALSE
        if kind is int or kind is float:
            return self._number(value)  # type: ignore[arg-type]  # as above
        if self._parts < 0 or depth > _DEPTH:
            return _opaque(value)
        if kind is dict:
            return self._mapping(value, depth)  # type: ignore[arg-type]  # as above
        if kind is list or kind is tuple:
            return self._sequence(value, depth)  # type: ignore[arg-type]  # as above
        return self._other(value, depth)

    def _mapping(self, value: dict[object, object], depth: int) -> _Pair:
        items = list(dict.items(value))  # copied in one go: another thread may write to it meanwhile
        size = len(items)
        if size > 2 * _ENDS:
            items = items[:_ENDS] + items[-_ENDS:]
        exact: list[tuple[Hashable, int]] = []
        shape: list[tuple[Hashable, int]] = []
        for key, part in items:
            first, second = self._any(part, depth + 1)
            if type(key) is str:
                exact.append((key, first))
                if not (len(key) < _LONGEST_LABEL and _is_label(key)):
                    shape.append((key, second))
            else:
                name, _ = self._any(key, depth + 1)
                exact.append((name, first))
                shape.append((name, second))
        if not shape and depth == 0:
            # Nothing else is given, so it labels nothing: approve(request_id=17) is about that request.
            shape = [(key, second) for key, second in exact if type(key) is str and key.lower().endswith("id")]
        # In no order, and with no size in the shape, for one that has a label has the shape of one that has none.
        return _hash(("mapping", size, frozenset(exact))), _hash(("mapping", frozenset(shape)))

    def _sequence(self, value: Sequence[object], depth: int) -> _Pair:
        size = len(value)
        parts = value if size <= 2 * _ENDS else [*value[:_ENDS], *value[-_ENDS:]]
        exact: list[int] = []
        shape: list[int] = []
        for part in parts:
            first, second = self._any(part, depth + 1)
            exact.append(first)
            shape.append(second)
        number = _hash(("sequence", size, tuple(exact)))
        return number, number if exact == shape else _hash(("sequence", size, tuple(shape)))

    def _other(self, value: object, depth: int) -> _Pair:
        """Fingerprint what JSON does not know. One that cannot be read must not spoil what it lies in."""
        try:
            return self._subclass(value, depth)
        except Exception as error:  # objects of the user's may do anything when they are looked into
            if is_interrupt(error):
                raise
            return _opaque(value)

    def _subclass(self, value: Any, depth: int) -> _Pair:
        """Fingerprint an instance of a subclass of what JSON knows, read past what it overrides."""
        kind = type(value)  # and not isinstance(), which asks the object for its class
        if issubclass(kind, str):
            return self._text(str.__str__(value), depth)
        if issubclass(kind, int):
            return self._number(int.__add__(value, 0))
        if issubclass(kind, float):
            return self._number(float.__add__(value, 0.0))
        if issubclass(kind, dict):
            return self._mapping(value, depth)
        if issubclass(kind, list):
            return self._sequence(list.__getitem__(value, slice(None)), depth)
        if issubclass(kind, tuple):
            return self._sequence(tuple.__getitem__(value, slice(None)), depth)
        if issubclass(kind, (set, frozenset)):
            return self._set(value, depth)
        return self._object(value, kind, depth)

    def _object(self, value: Any, kind: Any, depth: int) -> _Pair:
        name = _name_of(kind)
        if kind in _PLAIN:
            exact = _hash((name, _hash(value)))
            return exact, self._number(exact)[1]
        parts: object
        if issubclass(kind, BaseException):
            parts = BaseException.args.__get__(value) or _state(value)  # type: ignore[attr-defined]  # a descriptor in C
        elif issubclass(kind, enum.Enum):
            parts = object.__getattribute__(value, "_name_")
        elif issubclass(kind, _NAMED):
            parts = str(getattr(value, "__qualname__", "")) or str(getattr(value, "__name__", ""))
        else:
            parts = _buffer(value) or _state(value)
        exact, shape = self._any(parts, depth + 1)
        return _hash((name, exact)), _hash((name, shape))

    def _set(self, value: set[object] | frozenset[object], depth: int) -> _Pair:
        parts: set[object] = set().union(value)  # which reads a subclass past what it overrides
        size = len(parts)
        pairs = [self._any(part, depth + 1) for part in itertools.islice(parts, 2 * _ENDS)]
        return (
            _hash(("set", size, frozenset([exact for exact, _ in pairs]))),
            _hash(("set", size, frozenset([shape for _, shape in pairs]))),
        )


class _Arguments(_Walk):
    """Leaves out what labels or counts the request."""

    __slots__ = ()

    def _long_shape(self, text: str) -> int:
        return _unlabelled_at_ends(text)

    def _scrubbed(self, text: str) -> str:
        return _unlabelled(text)

    def _number(self, value: float) -> _Pair:
        number = _of_number(value)
        return number, number


class _Message(_Arguments):
    """Leaves out the ids of tool calls and blocks, too."""

    __slots__ = ("_ids",)

    def __init__(self) -> None:
        super().__init__()
        self._ids: set[str] = set()

    def _mapping(self, value: dict[object, object], depth: int) -> _Pair:
        made = dict.get(value, "id")
        if type(made) is str and len(made) > _SHORT_ID:
            kind = dict.get(value, "type")
            if (type(kind) is str and kind in _BLOCKS) or any(name in _REFERS for name in dict.keys(value) if type(name) is str):
                self._ids.add(made)
        return super()._mapping(value, depth)

    def _text(self, text: str, depth: int) -> _Pair:
        return _OMITTED if text in self._ids else super()._text(text, depth)


class _Result(_Walk):
    """Leaves out ids, times and numbers."""

    __slots__ = ()

    def _long_shape(self, text: str) -> int:
        return _hash((self._scrubbed(text[:_EDGE]), self._scrubbed(text[-_EDGE:])))

    def _scrubbed(self, text: str) -> str:
        return _DETAIL.sub("#", text)

    def _number(self, value: float) -> _Pair:
        return _of_number(value), _A_NUMBER


class _Exact(_Walk):
    """Leaves out nothing: where the shape is not asked for."""

    __slots__ = ()

    def _shape(self, text: str, exact: int) -> int:  # noqa: ARG002 - what the others look at
        return exact

    def _mapping(self, value: dict[object, object], depth: int) -> _Pair:
        items = list(dict.items(value))  # as above
        size = len(items)
        if size > 2 * _ENDS:
            items = items[:_ENDS] + items[-_ENDS:]
        parts = [(key if type(key) is str else self._any(key, depth + 1)[0], self._any(part, depth + 1)[0]) for key, part in items]
        number = _hash(("mapping", size, frozenset(parts)))
        return number, number

    def _number(self, value: float) -> _Pair:
        number = _of_number(value)
        return number, number


_OPENS: Final = frozenset("{[")
_CLOSES: Final = frozenset("}]")


_SMALL: Final = 1 << 53
"""Below this each whole number is its own fingerprint."""
_LONGEST_LABEL: Final = 24
"""No label is as long: longer keys are not asked for, so that the memo stays small."""


@functools.lru_cache(maxsize=1024)
def _is_label(key: str) -> bool:
    return key.lower().replace("_", "").replace("-", "") in _LABELS


def _of_number(value: float) -> int:
    """Give a number's fingerprint. Not its ``hash``: -1 and -2 have the same one, and NaN has a different one each time."""
    if 0 <= value < _SMALL and value == int(value):
        return int(value) + 1  # most numbers; 1 and 1.0 are the same. Not 0, which is the hash of no text
    if isinstance(value, int) and not -(1 << 256) < value < 1 << 256:
        return _hash(("number", value.bit_length(), value))  # to write it out would take long, or be refused
    return _hash(("number", repr(value).removesuffix(".0")))


@functools.lru_cache(maxsize=512)
def _name_of(kind: Any) -> str:
    return f"{type.__dict__['__module__'].__get__(kind)}.{type.__dict__['__qualname__'].__get__(kind)}"


def _opaque(value: object) -> _Pair:
    """Fingerprint what is not looked into: its type, and its size where that is known without asking it."""
    kind: Any = type(value)
    size = len(value) if kind in (dict, list, tuple, set, frozenset) else -1  # type: ignore[arg-type]  # one of these
    try:
        number = _hash(("opaque", _name_of(kind), size))
    except Exception as error:  # a metaclass of the user's may do anything
        if is_interrupt(error):
            raise
        return _UNKNOWN
    return number, number


def _buffer(value: object) -> tuple[int, int] | None:
    """Give size and hash of what holds bytes: ``bytes``, arrays."""
    try:
        view = memoryview(value)  # type: ignore[arg-type]  # this is how to learn whether it is one
    except TypeError:
        return None
    if view.nbytes > _BUFFER and view.c_contiguous:
        flat, end = view.cast("B"), _BUFFER // 2
        return view.nbytes, _hash(bytes(flat[:end]) + bytes(flat[-end:]))
    return view.nbytes, _hash(view.tobytes())


def _state(value: object) -> dict[str, object]:
    """Give an object's attributes, as they are stored: those of pydantic models, dataclasses and plain objects."""
    found: dict[str, object] = {}
    with contextlib.suppress(AttributeError):  # it has slots only
        found.update(object.__getattribute__(value, "__dict__"))
    kind: Any = type(value)
    for name, member in _members(kind):
        try:
            found[name] = member.__get__(value)
        except AttributeError:
            continue  # not set
    return found


@functools.lru_cache(maxsize=512)
def _members(kind: Any) -> tuple[tuple[str, Any], ...]:
    """List the slots of a class and its bases. Private ones tell how an object was made rather than what it is."""
    return tuple(
        (name, member)
        for base in type.__dict__["__mro__"].__get__(kind)
        for name, member in type.__dict__["__dict__"].__get__(base).items()
        if type(member) is types.MemberDescriptorType and (not name.startswith("__") or name == "__pydantic_extra__")
    )
