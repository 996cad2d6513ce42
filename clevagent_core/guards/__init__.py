"""The guards: each an ordinary plugin."""
