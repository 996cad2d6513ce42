"""Start the watchdog with the interpreter: ``clevagent.pth`` imports this where ``CLEVAGENT_AUTO_ATTACH`` is set.

A program then is guarded with no change to it, and no import of ClevAgent in it: everything comes from ``CLEVAGENT_*`` in the
environment (``CLEVAGENT_BUDGETS="usd=5 per=day"``), and each framework is attached to when the program imports it.
"""

from __future__ import annotations

import os
import sys

from clevagent_core import default
from clevagent_core.errors import ClevAgentError


def start() -> None:
    """Start the process's watchdog with the settings of the environment.

    Ends the process where those are wrong: the program would run without the ceilings that were asked for.
    """
    try:
        default.current()
    except ClevAgentError as error:
        sys.stderr.write(
            f"ClevAgent could not start, so the program was not started either (unset CLEVAGENT_AUTO_ATTACH to run it unguarded): {error}\n"
        )
        sys.stderr.flush()
        # An exception would be shown as a fault of the interpreter's, which is not up yet, and in the middle of other paths be ignored.
        os._exit(2)


if os.environ.get("CLEVAGENT_AUTO_ATTACH", "").lower() not in {"", "0", "false", "no", "off"}:
    start()
