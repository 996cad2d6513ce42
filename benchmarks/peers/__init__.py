"""ClevAgent beside its peers: one small module for each, driven as its own documentation says. Nothing here is a mock of a peer.

scripts/peers.sh .venv-peers                        # what it needs, in a virtual environment of its own
.venv-peers/bin/python -m benchmarks.peers.ceilings
.venv-peers/bin/python -m benchmarks.peers.costs
"""
