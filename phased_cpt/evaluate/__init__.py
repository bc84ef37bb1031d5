"""What a run has made, measured: base, every phase, merged."""

from phased_cpt.wanted import EvaluateWanted


def main(wanted: EvaluateWanted) -> int:
    raise NotImplementedError
