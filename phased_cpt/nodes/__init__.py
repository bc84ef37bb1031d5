"""A run on several machines: the same command on each, and node 0 conducts.

node 0   plan ─ prepare ─ order: start ─ phase ─ … ─ order: start ─ phase ─ … ─ leave
others   come ─ wait ────────────────── phase ─ … ───────────────── phase ─ … ─ leave with its exit code

Over one connection between node 0 and each of the others go orders, signs of life, and how the ranks there have ended;
what is trained, and all that is saved, goes through the run folder, which every node sees.
"""

from phased_cpt.nodes.attendant import attend
from phased_cpt.nodes.head import Head
from phased_cpt.nodes.hosts import Host, read_hostfile
from phased_cpt.nodes.identity import Identity, differences, identity_of

__all__ = ["Head", "Host", "Identity", "attend", "differences", "identity_of", "read_hostfile"]
