"""Benchmarks: ours, and ours beside the field. Each is a script and a module; ``benchmarks.results`` writes what they found."""
