"""What each phase of a plan needs on a machine, and what would make it fit.

hardware ─ of this machine, or of one that is spoken of
files ──── the DeepSpeed file that `auto` stands for
phases ─── memory: fits, tight, does not fit, not known, and what would
merge ──── the same of the merge at the end
needs ──── disk and time
spoken ─── what `plan --fit` tells
"""

from phased_cpt.fitting.files import base_to_estimate as base_to_estimate
from phased_cpt.fitting.files import config_of as config_of
from phased_cpt.fitting.files import filled_file as filled_file
from phased_cpt.fitting.hardware import Hardware as Hardware
from phased_cpt.fitting.hardware import hardware_here as hardware_here
from phased_cpt.fitting.merge import MergeFit as MergeFit
from phased_cpt.fitting.merge import fit_merge as fit_merge
from phased_cpt.fitting.needs import DiskNeed as DiskNeed
from phased_cpt.fitting.needs import PhaseTime as PhaseTime
from phased_cpt.fitting.needs import disk_needs as disk_needs
from phased_cpt.fitting.needs import making_bytes as making_bytes
from phased_cpt.fitting.needs import phase_times as phase_times
from phased_cpt.fitting.needs import remember_speed as remember_speed
from phased_cpt.fitting.phases import Change as Change
from phased_cpt.fitting.phases import PhaseFit as PhaseFit
from phased_cpt.fitting.phases import fit as fit
from phased_cpt.fitting.spoken import fit_facts as fit_facts
