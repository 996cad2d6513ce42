"""``clevagent ledger``: what agents have spent, as it stands in their file, and what an operator may change while they run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from clevagent_core.errors import ClevAgentError, UsageError

if TYPE_CHECKING:
    from clevagent_core.ledger.inspection import AccountRecord, LedgerFile, OwnerRecord

_NOT_DONE = 2


@click.group("ledger")
@click.option(
    "--ledger",
    "url",
    envvar="CLEVAGENT_LEDGER",
    help="The file: sqlite:///path or a path. CLEVAGENT_LEDGER when not given.",
)
@click.pass_context
def ledger_command(context: click.Context, url: str | None) -> None:
    """Look at a ledger that agents share, and change it while they run."""
    context.obj = url


@ledger_command.command("show")
@click.option("--all", "with_over", is_flag=True, help="Also windows and runs that are over; they are kept for an hour.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with amounts in US dollars, tokens or calls.")
@click.pass_obj
def show_command(url: str | None, *, with_over: bool, as_json: bool) -> None:
    """Show every account: what is spent, held and left; and the processes that use the file."""
    with _opened(url) as ledger:
        records = [record for record in ledger.accounts(time.time()) if with_over or not record.is_over]
        owners = ledger.owners()
    if as_json:
        click.echo(json.dumps({"accounts": [_plain(record) for record in records], "processes": list(map(_plain_owner, owners))}))
        return
    _print_tables(records, owners)


@ledger_command.command("top-up")
@click.argument("budget")
@click.option("--usd", help="By how many US dollars.")
@click.option("--tokens", type=int, help="By how many tokens, of a limit in tokens.")
@click.option("--input-tokens", type=int, help="By how many input tokens.")
@click.option("--output-tokens", type=int, help="By how many output tokens.")
@click.option("--llm-calls", type=int, help="By how many model calls.")
@click.option("--tool-calls", type=int, help="By how many tool calls.")
@click.option("--key", help="Whose account, where the budget has several; as `show` writes it.")
@click.pass_obj
def top_up_command(url: str | None, /, budget: str, key: str | None, **amounts: Any) -> None:
    """Raise a ceiling of BUDGET and open its latch: calls that were refused pass again."""
    from clevagent_core.ledger.inspection import choose, listed  # noqa: PLC0415 - not needed for --help
    from clevagent_core.money import to_pico  # noqa: PLC0415 - as above

    given = {unit: amount for unit, amount in amounts.items() if amount is not None}
    with _opened(url) as ledger:
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
@click.argument("budget")
@click.option("--key", help="Only this account; as `show` writes it. All of the budget's when not given.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def reset_command(url: str | None, budget: str, key: str | None, *, yes: bool) -> None:
    """Start the open accounts of BUDGET from zero, as if nothing had been spent. What calls in flight hold stays held."""
    from clevagent_core.ledger.inspection import choose  # noqa: PLC0415 - not needed for --help

    with _opened(url) as ledger:
        found = choose(ledger.accounts(time.time()), budget, key=key, unit=None)
        for record in found:
            click.echo(f"{budget!r} ({record.balance.key.key}) has spent {_amount(record, record.balance.spent)}.")
        if not yes:
            click.confirm("Start from zero? What was spent is forgotten", abort=True)
        count = sum(ledger.reset(record) for record in found)
    click.echo(f"Started {count} account{'' if count == 1 else 's'} from zero.")


@contextmanager
def _opened(url: str | None) -> Iterator[LedgerFile]:
    from clevagent_core.ledger.files import path_of  # noqa: PLC0415 - as above
    from clevagent_core.ledger.inspection import LedgerFile  # noqa: PLC0415 - not needed for --help

    try:
        path = path_of(url) if url else None
        if path is None:
            raise UsageError(
                f"{'No ledger was named' if not url else f'{url!r} is no file'}, so there is nothing to look at. Give "
                "--ledger sqlite:///path, or set CLEVAGENT_LEDGER. (Accounts in memory end with their process and cannot be seen from "
                "outside.)"
            )
        ledger = LedgerFile(path)
        try:
            yield ledger
        finally:
            ledger.close()
    except ClevAgentError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(_NOT_DONE)


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
        "stopped": balance.latched,
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
        state = "over" if record.is_over else "stopped" if balance.latched else "open"
        # Text, because names may look like markup.
        table.add_row(
            Text(f"{balance.key.budget}\n  {balance.key.key}"),
            Text(balance.key.window or "-"),
            *(Text(amount.split(" ")[0]) for amount in (spent, held)),
            Text(ceiling.replace(" ", "\n", 1)),
            Text(state, style="bold red" if state == "stopped" else ""),
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
        console.print(Text(f"process {owner.pid} of {owner.agent!r}: {state}"), highlight=False)
