"""What a person sees, and the same facts for a program."""

from phased_cpt.tables.data import combined_table, prepared_facts, prepared_table, trained_tokenizer
from phased_cpt.tables.fit import memory_table
from phased_cpt.tables.forgetting import forgetting_table, read_forgetting
from phased_cpt.tables.plan import config_facts, plan_facts, plan_table
from phased_cpt.tables.preflight import checks_table, fit_table
from phased_cpt.tables.status import status_facts, status_table
from phased_cpt.tables.summary import outcome_line, smoke_line, summary_facts, summary_table
from phased_cpt.tables.words import shown

__all__ = [
    "checks_table",
    "combined_table",
    "config_facts",
    "fit_table",
    "forgetting_table",
    "memory_table",
    "outcome_line",
    "plan_facts",
    "plan_table",
    "prepared_facts",
    "prepared_table",
    "read_forgetting",
    "shown",
    "smoke_line",
    "status_facts",
    "status_table",
    "summary_facts",
    "summary_table",
    "trained_tokenizer",
]
