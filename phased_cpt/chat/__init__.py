"""Base beside tuned, in one loaded model."""

from phased_cpt.wanted import ChatWanted


def main(wanted: ChatWanted) -> int:
    raise NotImplementedError
