"""What users may import: every name is there, is told of, and nothing else is public."""

from __future__ import annotations

import dataclasses
import inspect
import types

import pytest

import clevagent
import clevagent.testing

PUBLIC = [(module, name) for module in (clevagent, clevagent.testing) for name in module.__all__]


def documented(function):
    return (inspect.getdoc(function) or "").strip()


@pytest.mark.parametrize("module", [clevagent, clevagent.testing])
def test_all_is_sorted_and_without_repetitions(module):
    assert module.__all__ == sorted(set(module.__all__))


@pytest.mark.parametrize("module", [clevagent, clevagent.testing])
def test_all_is_what_is_public(module):
    """What is imported when it is named stands in __all__, too."""
    helpers = {"annotations", "Any", "TYPE_CHECKING"}
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name not in helpers
    }
    assert public <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


# hookimpl is pluggy's marker.
@pytest.mark.parametrize(("module", "name"), [found for found in PUBLIC if found[1] != "hookimpl"])
def test_every_public_name_has_a_docstring_of_its_own(module, name):
    value = getattr(module, name)
    text = documented(value)
    assert text
    # A dataclass without a docstring gets its signature for one.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, name in PUBLIC if isinstance(getattr(module, name), type)])
def test_every_public_method_has_a_docstring(module, name):
    kind = getattr(module, name)
    bare = [
        member
        for member, value in vars(kind).items()
        if not member.startswith("_")
        and isinstance(value, (types.FunctionType, property, classmethod, staticmethod))
        and not documented(value.fget if isinstance(value, property) else getattr(kind, member))
    ]
    assert bare == []


@pytest.mark.parametrize("name", clevagent.__all__)
def test_public_dataclasses_are_keyword_only(name):
    kind = getattr(clevagent, name)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        assert all(field.kw_only for field in dataclasses.fields(kind))


@pytest.mark.parametrize("name", [name for name in clevagent.__all__ if inspect.isfunction(getattr(clevagent, name))])
def test_every_argument_of_a_public_function_is_explained(name):
    function = getattr(clevagent, name)
    text = documented(function)
    # Where there is no list of arguments, the one line says it.
    arguments = inspect.signature(function).parameters if "Args:" in text else ()
    missing = [argument for argument in arguments if f"{argument}:" not in text]
    assert missing == []


def test_every_setting_is_named_where_init_is_explained():
    from clevagent_core.settings import Settings

    text = documented(clevagent.init)
    assert [field.name for field in dataclasses.fields(Settings) if f"``{field.name}``" not in text] == []


def test_every_error_that_can_be_caught_is_public():
    from clevagent_core import errors

    assert {name for name, value in vars(errors).items() if isinstance(value, type)} <= set(clevagent.__all__)
