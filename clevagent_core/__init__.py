"""The kernel of ClevAgent: budgets, guards, ledger, plugins and runs. It knows no framework and no server."""
