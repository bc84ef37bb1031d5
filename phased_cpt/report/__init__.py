"""A run folder, told to a person: as one page that can be looked at and sent, or live in a terminal."""

from phased_cpt.report.page import write_report

__all__ = ["write_report"]
