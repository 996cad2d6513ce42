"""The latch: a run that a budget has refused is refused again, whoever swallowed the exception.

It is kept in this process, on the run tree that was refused, and stops nobody else. A ceiling that was raised, or an account that was
reset, makes it void, also when another process did that to a shared ledger. What is resumed later is another run, and asked anew.
"""

from __future__ import annotations

from clevagent_core.ledger.account import Account, AccountKey, Balance, Refusal


class Latch:
    """What a run was refused at."""

    __slots__ = ("ceiling", "is_void")

    def __init__(self, ceiling: int) -> None:
        """Shut it. ``ceiling`` is the one that the refused call would have passed, in the account's unit."""
        self.ceiling = ceiling
        self.is_void = False


class Latches(dict[AccountKey, Latch]):
    """The latches of a run tree, or of a nested run that is over, by account. Safe from any thread."""

    def shut(self, refusal: Refusal) -> None:
        """Keep that an account has refused a call: all that it covers in this run tree is refused from now on."""
        self[refusal.line.account.key] = Latch(refusal.balance.ceiling)

    def is_shut(self, account: Account, balance: Balance) -> bool:
        """Check whether ``account`` has refused the run, and neither was topped up nor reset since. ``balance`` was just read."""
        found = self.get(account.key)
        if found is None or found.is_void:
            return False
        # Void for good: were it taken out instead, so could be one that another thread has shut at this moment.
        found.is_void = balance.ceiling > found.ceiling or not account.told
        return not found.is_void
