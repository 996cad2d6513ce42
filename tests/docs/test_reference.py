"""Every setting, budget field, hook and public name stands in the docs."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import clevagent
import clevagent.testing
from clevagent_core import hookspecs
from clevagent_core.budgets import Budget
from clevagent_core.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = {page.name: page.read_text() for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md")}
EVERYTHING = "\n".join(DOCS.values())
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("clevagent_"))


@pytest.mark.parametrize("name", [spec.name for spec in fields(Settings)])
def test_each_setting_is_explained(name):
    assert re.search(rf"^\| `{name}` \|", DOCS["settings.md"], re.MULTILINE)


@pytest.mark.parametrize("name", [spec.name for spec in fields(Budget)])
def test_each_field_of_a_budget_is_explained(name):
    assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", DOCS["settings.md"], re.MULTILINE)


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_has_a_heading_with_its_arguments(name):
    found = re.search(rf"^### `{name}\((.*)\)`$", DOCS["plugins.md"], re.MULTILINE)
    assert found is not None
    function = getattr(hookspecs, name)
    assert found[1].split(", ") == list(function.__annotations__)[:-1]


@pytest.mark.parametrize("name", [*clevagent.__all__, *clevagent.testing.__all__])
def test_each_public_name_is_in_the_docs(name):
    assert re.search(rf"\b{name}\b", EVERYTHING)


def test_hooks_stand_in_the_order_in_which_they_fire():
    """The page follows the specification's own order, providers last."""
    page = re.findall(r"^### `(\w+)\(", DOCS["plugins.md"], re.MULTILINE)
    source = re.findall(r"^def (clevagent_\w+)\(", Path(hookspecs.__file__).read_text(), re.MULTILINE)
    assert page == source
