"""``python -m clevagent``: the command ``clevagent``, also where scripts are not on the path."""

from __future__ import annotations

from clevagent.cli import main

if __name__ == "__main__":
    main()
