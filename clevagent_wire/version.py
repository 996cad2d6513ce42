"""The version of this distribution, for whoever says on the wire who is speaking."""

__version__ = "0.1.0"
