"""The layout: every package is packed, typed and held to its arrows, and the exceptions from them only get fewer."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
CONTRACTS = {contract["name"]: contract for contract in SETTINGS["importlinter"]["contracts"]}
CIRCLES = 14
"""How many imports still close a circle. Lower it with the list in pyproject.toml; it is never raised."""


def packages():
    return {path.parent.name for path in ROOT.glob("clevagent*/__init__.py")}


@pytest.mark.parametrize(
    "listed",
    [
        SETTINGS["hatch"]["build"]["targets"]["wheel"]["packages"],
        SETTINGS["mypy"]["packages"],
        SETTINGS["importlinter"]["root_packages"],
        CONTRACTS["One module sends over HTTP"]["source_modules"],
        CONTRACTS["No circles"]["ancestors"],
    ],
    ids=["wheel", "mypy", "import-linter", "http", "circles"],
)
def test_every_package_is_listed(listed):
    assert set(listed) == packages()


def test_every_package_has_a_layer():
    layers = CONTRACTS["Arrows go one way"]["layers"]
    assert {name.strip() for layer in layers for name in layer.split("|")} == packages()


@pytest.mark.parametrize("name", sorted(packages()))
def test_every_package_says_that_it_is_typed(name):
    assert (ROOT / name / "py.typed").is_file()


def test_the_list_of_circles_only_gets_shorter():
    assert len(CONTRACTS["No circles"]["ignore_imports"]) == CIRCLES


def test_no_other_contract_has_exceptions():
    """But for the one module that sends."""
    senders = {line.partition(" -> ")[0] for line in CONTRACTS["One module sends over HTTP"]["ignore_imports"]}
    assert senders == {"clevagent_heartbeat.sender"}
    others = [contract for name, contract in CONTRACTS.items() if name not in {"One module sends over HTTP", "No circles"}]
    assert not any(contract.get("ignore_imports") for contract in others)
