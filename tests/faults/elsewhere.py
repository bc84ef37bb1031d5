"""Proofs that stand elsewhere, because they belong to what they are about: test → (fault, how it is injected, verdict)."""

EXACT = "exact (E)"
LOCKS, BOOK, CRASHES = "tests/ledger/test_locks.py", "tests/ledger/test_book.py", "tests/ledger/test_crashes.py"
JOURNEYS, LAUNCHERS, DATA = "tests/journeys", "tests/launchers", "tests/data"
Proof = tuple[str, str, str]

ELSEWHERE: dict[str, tuple[Proof, ...]] = {
    f"{DATA}/test_crashes.py::test_a_build_stopped_anywhere_is_made_again_to_the_same_bytes": (
        ("F1", "SIGKILL, or an OSError, at each file operation of a build", "the same bytes"),
        ("F14", "ENOSPC at each file operation of a build", "the same bytes"),
    ),
    f"{CRASHES}::test_beginning_a_run": (("F6", "the ledger: SIGKILL, or an OSError, at each file operation", "the old state or the new one"),),
    f"{CRASHES}::test_beginning_and_publishing_phases": (("F4", "the ledger: SIGKILL, or an OSError, at each file operation", "the old state or the new one"),),
    f"{CRASHES}::test_any_series_of_crashes_ends_in_the_same_run": (("F7", "the ledger: any series of SIGKILLs (hypothesis)", "the same record"),),
    f"{JOURNEYS}/test_resume.py::test_a_run_that_takes_one_step_a_day_ends_as_one_that_is_never_stopped": (
        ("F8", "--steps-today 1: stopped after every step, of LoRA, QLoRA, all weights; ZeRO-2 and -3; fp32 and bf16", EXACT),
    ),
    f"{JOURNEYS}/test_resume.py::test_on_other_ranks_and_another_stage_the_same_blocks_give_the_same_losses": (
        ("F20", "2 ranks → 1, ZeRO-2 → 3 and back, under a half-done phase", "**not exact**: the same blocks and rates, losses within 1e-3; recorded"),
    ),
    f"{JOURNEYS}/test_publishing.py::test_a_phase_that_is_broken_or_killed_publishes_nothing_and_is_trained_again": (
        ("F11", "SIGKILL of rank 1 in a step of the second phase", "nothing published; goes on"),
    ),
    f"{JOURNEYS}/test_publishing.py::test_what_was_published_just_before_the_end_is_adopted": (
        ("F4", "the conductor gone between the weights and the ledger's line", "adopted, not trained again"),
        ("F17", "a byte of what is published, its marker", "refused by name"),
    ),
    f"{JOURNEYS}/test_publishing.py::test_a_byte_that_has_changed_is_noticed_before_the_next_phase_starts": (
        ("F17", "a byte of what is published", "refused by name, with what to do"),
    ),
    f"{JOURNEYS}/test_publishing.py::test_a_run_goes_on_from_another_place_and_by_nothing_that_adapter_config_says_of_places": (
        ("F29", "the run folder moved between two phases", "goes on from the same weights"),
    ),
    f"{JOURNEYS}/test_failures.py::test_training_that_leaves_the_numbers_ends_with_its_own_exit_code_through_both_doors": (
        ("F24", "a loss that is no number, on one rank, through both doors", "exit 5, step and blocks named, nothing published"),
    ),
    f"{JOURNEYS}/test_failures.py::test_what_befalls_one_rank_of_the_second_door_is_told_once_and_the_same_command_goes_on": (
        ("F11", "one rank of `deepspeed` fails or is killed", "told once, nobody is left, goes on"),
    ),
    f"{JOURNEYS}/test_failures.py::test_when_there_is_nothing_left_to_do_every_rank_leaves_at_once": (
        ("F22", "the second door, called again when all is done", "nothing is trained"),
    ),
    f"{JOURNEYS}/test_failures.py::test_out_of_memory_is_told_with_what_to_change": (
        ("F25", "RLIMIT_AS in a rank", "told with the step, the rows and what to change"),
    ),
    f"{JOURNEYS}/test_failures.py::test_a_rank_behind_a_launcher_ends_with_the_conductor": (
        ("F10", "SIGKILL of the conductor behind a launcher", "nobody is left"),
    ),
    f"{JOURNEYS}/test_doors.py::test_whoever_is_killed_nobody_is_left_and_the_same_command_goes_on": (
        ("F11", "as it is typed: SIGKILL of a rank", "all end, the rank and the signal named; goes on"),
        ("F10", "as it is typed: SIGKILL of the conductor", "nobody is left; goes on"),
    ),
    f"{JOURNEYS}/test_stops.py::test_a_rank_that_is_asked_to_stop_takes_the_others_with_it_at_one_step": (
        ("F8", "SIGTERM to one rank while it loads, starts, trains, evaluates, saves", "one step for all, sealed; exact (E)"),
        ("F13", "SIGTERM to one rank alone, in every passage", "all stop after the same step; exact (E)"),
    ),
    f"{JOURNEYS}/test_stops.py::test_whoever_started_it_is_asked_to_stop_and_any_way_goes_on": (
        ("F8", "as it is typed: SIGTERM to a rank, to our `deepspeed`", "exit 75, sealed, nobody left; goes on"),
        ("F9", "as it is typed: Ctrl-C", "exit 75, sealed, nobody left; goes on"),
    ),
    f"{LAUNCHERS}/test_start.py::test_a_signal_to_the_conductor_is_a_stop_of_the_ranks": (("F8", "SIGTERM, SIGINT, SIGHUP to the conductor", "the ranks stop by themselves"),),
    f"{LAUNCHERS}/test_start.py::test_a_stop_ends_ranks_that_have_not_begun": (("F8", "while the ranks load", "they end"),),
    f"{LAUNCHERS}/test_start.py::test_when_the_conductor_goes_at_once_nobody_is_left": (("F9", "asked twice, or killed", "nobody is left"),),
    f"{LAUNCHERS}/test_start.py::test_the_ranks_of_a_launcher_that_was_killed_are_ended": (("F10", "SIGKILL of the launcher alone", "its ranks are ended, and it is no success"),),
    f"{LAUNCHERS}/test_guard.py::test_a_signal_to_the_shim_is_a_stop_of_the_ranks": (("F8", "a signal to our `deepspeed`", "the ranks stop by themselves, exit 75"),),
    f"{LAUNCHERS}/test_guard.py::test_the_second_signal_ends_them_all": (("F9", "a second signal to our `deepspeed`", "all end at once"),),
    f"{LAUNCHERS}/test_guard.py::test_when_one_of_them_is_killed_the_ranks_stop": (("F10", "SIGKILL of our `deepspeed`, of DeepSpeed's, of its launch.py", "the ranks stop"),),
    f"{LAUNCHERS}/test_parents.py::test_a_rank_of_the_second_door_stops_when_its_launcher_dies": (("F10", "SIGTERM or SIGKILL of launch.py", "the ranks stop"),),
    f"{LAUNCHERS}/test_parents.py::test_a_rank_of_the_first_door_dies_with_its_launcher": (("F10", "SIGKILL of the launcher", "the ranks die"),),
    f"{LAUNCHERS}/test_parents.py::test_an_orphan_that_does_not_stop_is_ended_in_the_end": (("F21", "an orphan that does not stop", "ended in the end"),),
    f"{LAUNCHERS}/test_hang.py::test_a_rank_that_stands_still_tells_where_and_leaves": (("F12", "a rank that hangs", "stacks written, named, ended"),),
    f"{LAUNCHERS}/test_hang.py::test_of_two_one_that_was_stopped_is_named_by_the_other_and_killed_where_no_launcher_would": (
        ("F12", "SIGSTOP of a rank of the second door", "named by the other, all ended"),
    ),
    f"{LAUNCHERS}/test_supervision.py::test_a_rank_that_was_stopped_is_named_first_and_all_are_killed": (("F12", "SIGSTOP of a rank", "named, all ended"),),
    f"{LAUNCHERS}/test_supervision.py::test_a_rank_that_leaves_by_itself_is_followed_by_the_others": (("F13", "one rank hears of a stop before the others", "they follow"),),
    f"{LOCKS}::test_a_second_run_is_told_who_holds_the_folder": (("F21", "two at once", "the second is told who holds it, exit 1"),),
    f"{LOCKS}::test_ranks_that_outlive_their_conductor_keep_a_new_run_out": (("F21", "a rank that outlives its conductor", "keeps a new run out"),),
    f"{LOCKS}::test_a_rank_that_comes_late_to_a_dead_run_is_turned_away": (("F21", "a rank that comes late to a dead run", "turned away"),),
    f"{BOOK}::TestStatus::test_a_damaged_record_is_named": (("F17", "run.json damaged", "named, nothing guessed"),),
    f"{BOOK}::TestStatus::test_a_record_of_a_newer_version_is_not_guessed_at": (("F30", "a run.json of a newer format", "refused"),),
    f"{DATA}/test_odd_input.py::test_a_seal_that_was_changed_seals_nothing": (("F17", "the seal of the cache", "made again"),),
    f"{DATA}/test_documents.py::test_what_cannot_be_used_is_told_with_its_place": (("F26", "a file for each kind of bad record", "file and line, exit 2"),),
    f"{DATA}/test_documents.py::test_files_that_cannot_be_used_are_named": (("F26", "a file that is none", "named, exit 2"),),
    "tests/config/test_never_a_traceback.py::test_a_shipped_run_with_odd_values_in_any_place": (("F26", "configurations of any kind (hypothesis)", "read or refused, never a traceback"),),
    "tests/config/test_secrets.py::test_a_secret_is_never_repeated": (("F27", "a secret in a configuration or typed", "refused, never repeated"),),
    "tests/config/test_secrets.py::test_a_known_value_is_scrubbed_from_any_message": (("F27", "the value of a known variable in a message", "scrubbed"),),
}  # fmt: skip
