"""``clevagent ledger``: what agents have spent, as it stands in their file, and what an operator may change while they run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clevagent_core.errors import ClevAgentError, UsageError

if TYPE_CHECKING:
    from clevagent_core.ledger.inspection import AccountRecord, LedgerFile, OwnerRecord

_NOT_DONE = 2
_ledger_option = click.option(
    "--ledger",
    "option",
    metavar="LEDGER",
    help="The ledger's file: sqlite:///PATH or a plain path. Without it, CLEVAGENT_LEDGER.",
)


@click.group("ledger", epilog="The ledger may be named before or after the command, or as the command's first argument.")
@_ledger_option
@click.pass_context
def ledger_command(context: click.Context, option: str | None) -> None:
    """Show what agents have spent, and change it while they run."""
    context.obj = option


@ledger_command.command("show")
@click.argument("ledger", required=False)
@_ledger_option
@click.option("--all", "with_over", is_flag=True, help="Also show windows and runs that are over; they are kept for an hour.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with amounts in US dollars, tokens or calls.")
@click.pass_obj
def show_command(before: str | None, *, ledger: str | None, option: str | None, with_over: bool, as_json: bool) -> None:
    """Show what each budget has spent and holds, and who uses the file."""
    with _opened(before, option, ledger) as opened:
        everything = list(opened.accounts(time.time()))
        owners = opened.owners()
    records = [record for record in everything if with_over or not record.is_over]
    if as_json:
        click.echo(json.dumps({"accounts": [_plain(record) for record in records], "processes": list(map(_plain_owner, owners))}))
        return
    _print_tables(records, owners)


@ledger_command.command("top-up")
@click.argument("words", nargs=-1, metavar="[LEDGER] BUDGET")
@_ledger_option
@click.option("--usd", metavar="AMOUNT", help="How many US dollars to add.")
@click.option("--tokens", type=int, help="How many tokens to add, to a limit in tokens.")
@click.option("--input-tokens", type=int, help="How many input tokens to add.")
@click.option("--output-tokens", type=int, help="How many output tokens to add.")
@click.option("--llm-calls", type=int, help="How many model calls to add.")
@click.option("--tool-calls", type=int, help="How many tool calls to add.")
@click.option("--key", help="Which account, if the budget has several; as `show` prints it.")
@click.pass_obj
def top_up_command(before: str | None, /, words: Sequence[str], option: str | None, key: str | None, **amounts: Any) -> None:
    """Raise the ceiling of BUDGET by one of the amounts below.

    Calls that were refused can pass again, without a restart. BUDGET is a name that `show` prints; with two arguments, the first is the
    ledger's file.
    """
    from clevagent_core.ledger.inspection import choose, listed  # noqa: PLC0415 - not needed for --help
    from clevagent_core.money import to_pico  # noqa: PLC0415 - as above

    given = {unit: amount for unit, amount in amounts.items() if amount is not None}
    argument, budget = _ledger_and_budget(words, before, option)
    with _opened(before, option, argument) as ledger:
        if len(given) != 1:
            raise UsageError("Give exactly one amount, for example --usd 5; nothing was changed.")
        ((unit, amount),) = given.items()
        number = to_pico(amount, what="--usd") if unit == "usd" else amount
        if number <= 0:
            raise UsageError(f"--{unit.replace('_', '-')} {amount} adds nothing, so nothing was changed. Give an amount above 0.")
        found = choose(ledger.accounts(time.time()), budget, key=key, unit=unit)
        if len(found) > 1:
            keys = listed([repr(record.balance.key.key) for record in found])
            raise UsageError(
                f"The budget {budget!r} has {len(found)} open accounts, so nothing was changed. Say which, with --key: {keys}."
            )
        ceiling = ledger.top_up(found[0], number)
    click.echo(f"The ceiling of {budget!r} ({found[0].balance.key.key}) is now {_amount(found[0], ceiling)}.")


@ledger_command.command("reset")
@click.argument("words", nargs=-1, metavar="[LEDGER] BUDGET")
@_ledger_option
@click.option("--key", help="Reset only this account, as `show` prints it; by default all of the budget's.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.pass_obj
def reset_command(before: str | None, *, words: Sequence[str], option: str | None, key: str | None, yes: bool) -> None:
    """Set what BUDGET has spent back to zero.

    What calls in flight hold stays held. BUDGET is a name that `show` prints; with two arguments, the first is the ledger's file.
    """
    from clevagent_core.ledger.inspection import choose  # noqa: PLC0415 - not needed for --help

    argument, budget = _ledger_and_budget(words, before, option)
    with _opened(before, option, argument) as ledger:
        found = choose(ledger.accounts(time.time()), budget, key=key, unit=None)
        for record in found:
            click.echo(f"{budget!r} ({record.balance.key.key}) has spent {_amount(record, record.balance.spent)}.")
        if not yes:
            click.confirm("Start from zero? What was spent is forgotten", abort=True)
        count = sum(ledger.reset(record) for record in found)
    click.echo(f"Started {count} account{'' if count == 1 else 's'} from zero.")


def _ledger_and_budget(words: Sequence[str], *named: str | None) -> tuple[str | None, str]:
    """Split the arguments ``[LEDGER] BUDGET``: click has no optional argument in front of a required one.

    Args:
        words: the arguments.
        named: the ledger, where an option names it.

    """
    is_named = any((*named, os.environ.get("CLEVAGENT_LEDGER")))
    match words:
        case (word,) if not is_named and Path(word).is_file():
            raise click.UsageError(f"Missing argument 'BUDGET' after the ledger {word!r}.")
        case (budget,):
            return None, budget
        case (ledger, budget):
            return ledger, budget
        case ():
            raise click.UsageError("Missing argument 'BUDGET'.")
        case _:
            raise click.UsageError(f"Got {len(words)} arguments, where [LEDGER] BUDGET are at most two: {' '.join(words)}")


@contextmanager
def _opened(*given: str | None) -> Iterator[LedgerFile]:
    """Open the ledger that was named in one of several places, or else in the environment."""
    from clevagent_core.ledger.inspection import LedgerFile  # noqa: PLC0415 - not needed for --help

    named = [url for url in given if url] or [os.environ.get("CLEVAGENT_LEDGER", "")]
    try:
        ledger = LedgerFile(_path(named))
        try:
            yield ledger
        finally:
            ledger.close()
    except ClevAgentError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(_NOT_DONE)


def _path(urls: Sequence[str]) -> Path:
    """Return the one file that all of ``urls`` name.

    Raises:
        UsageError: they name several, or none.

    """
    from clevagent_core.ledger.files import path_of  # noqa: PLC0415 - not needed for --help

    paths = {url: path_of(url) or (Path(url) if url and Path(url).is_file() else None) for url in urls}
    if len({path.resolve() if path else url for url, path in paths.items()}) > 1:
        raise UsageError(f"Different ledgers were named, {' and '.join(map(repr, paths))}, so none was opened. Give one of them.")
    url, path = next(iter(paths.items()))
    if path is None:
        raise UsageError(
            f"{f'{url!r} is not a file' if url else 'No ledger was named'}, so there is nothing to look at. Give --ledger sqlite:///path, or "
            "set CLEVAGENT_LEDGER. (Accounts in memory end with their process and cannot be seen from outside.)"
        )
    return path


def _scale(record: AccountRecord) -> Callable[[int], float]:
    from clevagent_core.budgets import USD  # noqa: PLC0415 - not needed for --help
    from clevagent_core.money import to_usd  # noqa: PLC0415 - as above

    return to_usd if record.balance.key.unit == USD else int


def _amount(record: AccountRecord, number: int) -> str:
    from clevagent_core.budgets import UNITS, USD  # noqa: PLC0415 - not needed for --help
    from clevagent_core.money import format_usd  # noqa: PLC0415 - as above

    unit = record.balance.key.unit
    return format_usd(number) if unit == USD else f"{number:,} {UNITS[unit].replace('_', ' ')}"


def _plain(record: AccountRecord) -> dict[str, object]:
    from clevagent_core.budgets import UNITS  # noqa: PLC0415 - not needed for --help

    balance, scale = record.balance, _scale(record)
    amounts = {"ceiling": balance.ceiling, "spent": balance.spent, "held": balance.held, "free": balance.free}
    return {
        "budget": balance.key.budget,
        "key": balance.key.key,
        "window": balance.key.window,
        "unit": UNITS[balance.key.unit],
        **{name: scale(number) for name, number in amounts.items()},
        "topped_up": scale(record.topped_up),
        "exhausted": balance.is_exhausted,
        "over": record.is_over,
    }


def _plain_owner(owner: OwnerRecord) -> dict[str, object]:
    return {name: getattr(owner, name) for name in ("pid", "agent", "started_at", "is_alive", "calls_in_flight")}


def _print_tables(records: list[AccountRecord], owners: list[OwnerRecord]) -> None:
    from rich import box  # noqa: PLC0415 - not needed for --help
    from rich.console import Console  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    # The key stands under its budget and the unit under its ceiling, so that neither has to be broken in 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("budget\n  key", overflow="fold")
    table.add_column("window", no_wrap=True)
    for title in ("spent", "held", "ceiling"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for record in records:
        balance = record.balance
        spent, held, ceiling = (_amount(record, number) for number in (balance.spent, balance.held, balance.ceiling))
        state = "over" if record.is_over else "exhausted" if balance.is_exhausted else "open"
        # Text, because names may look like markup.
        table.add_row(
            Text(f"{balance.key.budget}\n  {balance.key.key}"),
            Text(balance.key.window or "-"),
            *(Text(amount.split(" ")[0]) for amount in (spent, held)),
            Text(ceiling.replace(" ", "\n", 1)),
            Text(state, style="bold red" if state == "exhausted" else ""),
        )
    console = Console()
    console.print(table if records else "No account yet: nothing that a budget covers was called.", highlight=False)
    if owners:
        console.print()
    for owner in owners:
        calls = f"{owner.calls_in_flight} call{'' if owner.calls_in_flight == 1 else 's'} in flight"
        state = (
            calls
            if owner.is_alive
            else "has ended" + (f" with {calls}, charged when the next process looks" if owner.calls_in_flight else "")
        )
        # Not by rich, which would break the line where the width of a pid says; a terminal wraps it, and grep finds it whole.
        click.echo(f"process {owner.pid} of {owner.agent!r}: {state}")
