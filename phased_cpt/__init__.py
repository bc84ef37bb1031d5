"""Teach a language model in stages: one YAML, one command, one adapter handed from phase to phase."""

__version__ = "0.1.0.dev0"
