"""How the ranks of a job are started: a launcher turns a job into commands and their environment."""

from phased_cpt.launchers.commands import (
    LAUNCHERS,
    Command,
    Environment,
    Launcher,
    before_the_imports,
    free_port,
    shared,
    threads_of_a_rank,
)
from phased_cpt.launchers.machine import gpus_here, ranks_here
from phased_cpt.launchers.parents import CONDUCTOR
from phased_cpt.launchers.start import launched

__all__ = [
    "CONDUCTOR",
    "LAUNCHERS",
    "Command",
    "Environment",
    "Launcher",
    "before_the_imports",
    "free_port",
    "gpus_here",
    "launched",
    "ranks_here",
    "shared",
    "threads_of_a_rank",
]
