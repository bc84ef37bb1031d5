"""Whatever adapter it is, the merged folder is base and adapter: by plain transformers, and nothing of ours."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from phased_cpt.data.watch import Unwatched
from phased_cpt.merge.story import merge
from tests.merge.conftest import Making
from tests.merge.kinds import EXACT, KINDS, PEFT_IS_WRONG, apart, job, logits, plain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied weights


@pytest.mark.requirement("M-01")
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_folder_answers_as_base_and_adapter_do(kind: str, made: Making, output: Path) -> None:
    it = made(kind)
    merge(job(it.base, it.adapter, output), Unwatched())
    model, loading = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert {what: found for what, found in loading.items() if found} == {}
    live = it.live()
    expected = logits(live)
    assert apart(logits(model.eval()), expected) <= EXACT
    assert apart(logits(plain(it.base)), expected) > 1e-3, "the control: the adapter does something"
    if kind not in PEFT_IS_WRONG:
        theirs = dict(live.merge_and_unload().named_parameters())
        ours = dict(model.named_parameters())
        assert ours.keys() == theirs.keys()
        off = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
        assert max(off.values()) <= 1e-6, off


@pytest.mark.parametrize("kind", PEFT_IS_WRONG)
def test_pefts_own_merge_of_tied_embeddings_is_another_model(kind: str, made: Making) -> None:
    """Why every parameter is not compared with PEFT's: it merges into the one weight that both ends share."""
    live = made(kind).live()
    expected = logits(live)
    assert apart(logits(live.merge_and_unload()), expected) > 100 * EXACT
