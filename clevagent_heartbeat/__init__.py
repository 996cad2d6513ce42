"""Heartbeats: what they say, when they are made, and how they are delivered without disturbing the work."""
