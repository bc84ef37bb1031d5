"""What is done: the record of a run on disk, the fingerprints that chain its phases, and the locks that guard it."""

from phased_cpt.ledger.book import Ledger
from phased_cpt.ledger.choose import choose_run_dir, newest_run, next_archive
from phased_cpt.ledger.fingerprint import Adapter, Inputs, Weights
from phased_cpt.ledger.locks import holder_of, rank_lock, require_no_ranks, run_lock
from phased_cpt.ledger.match import amended, reconcile
from phased_cpt.ledger.record import PhaseRecord, RunRecord, read_record

__all__ = [
    "Adapter",
    "Inputs",
    "Ledger",
    "PhaseRecord",
    "RunRecord",
    "Weights",
    "amended",
    "choose_run_dir",
    "holder_of",
    "newest_run",
    "next_archive",
    "rank_lock",
    "read_record",
    "reconcile",
    "require_no_ranks",
    "run_lock",
]
