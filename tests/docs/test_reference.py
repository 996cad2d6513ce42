"""Every setting, budget field, hook and public name stands in the docs, in backticks; and the docs name none that is gone."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import clevagent
import clevagent.testing
from clevagent.testing import Reply
from clevagent_core import hookspecs
from clevagent_core.budgets import Budget
from clevagent_core.pricing import Price
from clevagent_core.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
PUBLISHED = {"clevagent_node_callback", "clevagent_step_callback", "clevagent_task_callback"}
"""What the published paths call our callbacks."""
DOCS = {page.name: page.read_text() for page in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")}
PROSE = {name: re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for name, text in DOCS.items()}
"""The pages without their blocks: a name that only stands in an example is not explained."""
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("clevagent_"))
WIDTH = 132


def rows(page: str) -> set[str]:
    """Every name that has a row of its own, or shares one, in a table of ``page``."""
    first_cells = re.findall(r"^\|([^|]*)\|", PROSE[page], re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("name", [spec.name for spec in fields(Settings)])
def test_each_setting_is_explained(name):
    assert re.search(rf"^\| `{name}` \|", DOCS["settings.md"], re.MULTILINE)


@pytest.mark.parametrize("spec", fields(Settings), ids=lambda spec: spec.name)
def test_a_setting_without_a_variable_says_so(spec):
    row = re.search(rf"^\| `{spec.name}` \|.*$", DOCS["settings.md"], re.MULTILINE)
    assert row is not None
    assert ("Not in the environment" in row[0]) is (spec.metadata["read"] is None)


@pytest.mark.parametrize("name", [spec.name for spec in fields(Budget)])
def test_each_field_of_a_budget_is_explained_with_its_default(name):
    default = next(spec.default for spec in fields(Budget) if spec.name == name)
    row = re.search(rf"^\| `{name}` \| ([^|]*) \|[^|]*\| `Budget\([^|]*\)` \|$", DOCS["settings.md"], re.MULTILINE)
    assert row is not None
    if default is not None:
        assert row[1].strip('`"') == str(default)


@pytest.mark.parametrize("name", [spec.name for spec in fields(Price)])
def test_each_field_of_a_price_is_explained(name):
    assert name in rows("settings.md")


@pytest.mark.parametrize("name", [spec.name for spec in fields(Reply)])
def test_each_field_of_a_reply_is_explained(name):
    assert name in rows("testing.md")


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_has_a_heading_with_its_arguments(name):
    found = re.search(rf"^### `{name}\((.*)\)`$", DOCS["plugins.md"], re.MULTILINE)
    assert found is not None
    function = getattr(hookspecs, name)
    assert re.findall(r"\w+", found[1]) == list(function.__annotations__)[:-1]


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_is_called_hot_or_not_as_it_is(name):
    section = DOCS["plugins.md"].partition(f"### `{name}(")[2].partition("\n### ")[0]
    assert ("\nHot. " in section) is (name in hookspecs.HOT_HOOKS)


def test_hooks_stand_in_the_order_in_which_they_fire():
    """The page follows the specification's own order, providers last."""
    page = re.findall(r"^### `(\w+)\(", DOCS["plugins.md"], re.MULTILINE)
    source = re.findall(r"^def (clevagent_\w+)\(", Path(hookspecs.__file__).read_text(), re.MULTILINE)
    assert page == source


@pytest.mark.parametrize("name", [*clevagent.__all__, *clevagent.testing.__all__])
def test_each_public_name_is_in_the_docs(name):
    assert any(re.search(rf"`(?:with |@)?(?:clevagent\.)?{name}(?:\(|`)", text) for text in PROSE.values())


def test_the_docs_name_no_hook_and_no_variable_that_is_gone():
    readable = {ENV_PREFIX + spec.name.upper() for spec in fields(Settings) if spec.metadata["read"] is not None}
    readable.add("CLEVAGENT_AUTO_ATTACH")
    others = {path.name for path in ROOT.glob("clevagent_*") if path.is_dir()} | PUBLISHED | {"clevagent_run"}
    for page, text in DOCS.items():
        assert set(re.findall(r"\bclevagent_[a-z_]+\b", text)) <= {*HOOKS, *others}, page
        assert set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]*[A-Z]\b", text)) <= readable, page


@pytest.mark.parametrize("page", [name for name in DOCS if name != "README.md"])
def test_lines_are_not_too_long(page):
    assert [line for line in DOCS[page].splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", sorted(DOCS))
def test_links_to_headings_lead_to_one(page):
    """A link such as ``promise.md#what-is-not-covered`` names a heading as its page has it."""
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", DOCS[page]):
        text = DOCS[Path(target).name] if target else DOCS[page]
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{page}: {target}#{anchor}"
