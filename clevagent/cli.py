"""The command ``clevagent``. What a command needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import click

from clevagent.ledger_command import ledger_command
from clevagent_core.errors import ClevAgentError
from clevagent_wire.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from clevagent_core.plugins import PluginState

_NOT_DONE = 2
"""The exit code where nothing could be done, because something has to be put right first."""
_DEMO_NEEDS = ("langchain_core", "langchain.agents", "langchain_openai")
_STYLES = {"loaded": "green", "not installed": "dim", "blocked": "yellow", "broken": "bold red"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="clevagent", message="%(prog)s %(version)s")
def main() -> None:
    """ClevAgent refuses an agent's next call before the money is spent."""


main.add_command(ledger_command)

# -- clevagent plugins ----------------------------------------------------------------------------------------------------


@main.command("plugins")
def plugins_command() -> None:
    """List the plugins, and whether each is loaded.

    A plugin is loaded, not installed (what it guards is not installed), blocked (by CLEVAGENT_BLOCK) or broken. The exit code is 1 if
    a plugin is broken.
    """
    from rich.console import Console  # noqa: PLC0415 - not needed for --help

    try:
        states = _plugin_states()
    except ClevAgentError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(_NOT_DONE)
    console = Console()
    console.print(_plugin_table(states))
    missing = [state.name for state in states if state.status == "not installed" and state.source == "clevagent"]
    if missing:
        # As it stands, also between brackets: no markup.
        console.print(
            "A plugin that is not installed waits for its framework. To add it, in the folder of ClevAgent's repository:\n"
            f'  pip install ".[{",".join(missing)}]"',
            highlight=False,
            markup=False,
        )
    broken = sum(state.status == "broken" for state in states)
    if broken:
        console.print(
            f"{broken} of {len(states)} plugins {'is' if broken == 1 else 'are'} broken and left out; the others work. Fix or "
            "uninstall what is broken, or leave it out knowingly with CLEVAGENT_BLOCK=name.",
            highlight=False,
        )
        sys.exit(1)


def _plugin_states() -> tuple[PluginState, ...]:
    """Load the plugins as ``init()`` would, with the settings of the environment.

    Raises:
        UsageError: the environment has a setting that is unknown or cannot be used.

    """
    from clevagent_core.plugins import Plugins  # noqa: PLC0415 - not needed for --help
    from clevagent_core.settings import Settings  # noqa: PLC0415 - as above

    settings = Settings.resolve({})
    plugins = Plugins(block=settings.block)
    logger = logging.getLogger("clevagent")
    was_disabled = logger.disabled
    # A broken plugin stands in the table; the warning would say the same once more.
    logger.disabled = True
    try:
        plugins.load(settings.plugins)
    finally:
        logger.disabled = was_disabled
    return plugins.states()


def _plugin_table(states: Sequence[PluginState]) -> Table:
    from rich import box  # noqa: PLC0415 - not needed for --help
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    # Wide enough for our own names; hooks fit what is left of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("name", "source", "status", "hooks, or the reason"):
        table.add_column(title, overflow="fold", no_wrap=title == "status", min_width=28 if title == "name" else None)
    for state in states:
        # Text, because a plugin's own words may look like markup.
        detail = state.detail.replace(", ", "\n") if state.status == "loaded" else state.detail
        status = Text(state.status, style=_STYLES.get(state.status, ""))
        table.add_row(Text(state.name), Text(state.source), status, Text(detail))
    return table


# -- clevagent demo -------------------------------------------------------------------------------------------------------


@main.command("demo")
def demo_command() -> None:
    """See runaway agents stopped, and what happens without a guard.

    Real agents of LangChain and LangGraph, OpenAI's real client and, where CrewAI is installed, a crew call a provider on this machine,
    which keeps the bill: no key, no account, no network, no cost.

    Takes about half a minute, longer on a busy machine. The exit code is 0 if every agent was stopped by what should stop it, no ceiling
    was passed and every ledger agrees with the bill; 1 if not; 2 if a package is missing.
    """
    missing = _missing_for_the_demo()
    if missing:
        click.echo(
            "The demo runs real LangChain agents, and this Python cannot import what that takes:\n"
            + "".join(f"  {name}: {why}\n" for name, why in missing)
            + "Install it, in the folder of ClevAgent's repository, with\n"
            '  pip install ".[demo]"\n'
            "ClevAgent itself needs none of it.",
            err=True,
        )
        sys.exit(_NOT_DONE)
    from clevagent.demo.report import perform  # noqa: PLC0415 - not needed for --help
    from clevagent.demo.results import exit_code  # noqa: PLC0415 - as above

    sys.exit(exit_code(perform()))


def _missing_for_the_demo() -> list[tuple[str, str]]:
    missing = []
    for name in _DEMO_NEEDS:
        try:
            import_module(name)
        except ImportError as error:
            missing.append((name, str(error)))
    return missing
