"""The account of what is spent and held, per budget, key and window."""
