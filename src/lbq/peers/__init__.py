"""Other engines at the same shape on the same machine, for ``lbq bench --peers``: those that are installed.

Each runs in a process of its own, on random BF16 weights that it quantises itself, by its own defaults.
"""

from lbq.peers.run import run_peers

__all__ = ["run_peers"]
