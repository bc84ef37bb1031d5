"""Chats in which only what the assistant says is trained: which words these are, and that it is these and no others."""

import functools
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from phased_cpt.data.account import account_of
from phased_cpt.data.backends import Backend, Proof
from phased_cpt.data.blocks import IGNORED, Blocks
from phased_cpt.data.chunks import counted
from phased_cpt.data.inspection import shown_block
from phased_cpt.data.packing import PACKERS
from phased_cpt.data.piecework import _encoded
from phased_cpt.data.prepared import PreparedRun
from phased_cpt.data.render import Rendering, render
from phased_cpt.data.said import _spelling, mask_of
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer
from phased_cpt.errors import InputError
from tests.conftest import REPOSITORY, SAMPLE, TOKENIZER, Call, Write
from tests.data.conftest import Prepare, lines
from tests.data.shapes import EOS, Prepared

CHATML = """\
{%- for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
LLAMA = """\
{{- '<|begin|>' }}
{%- for message in messages %}
{{- '<|start|>' + message.role + '<|stop|>\\n\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{{ (message.tool_calls or '') and (message.tool_calls | tojson) }}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content | trim }}<|im_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}"""
MARKING = {"ChatML": CHATML, "Llama 3": LLAMA}
PLAIN = {name: source.replace("{% generation %}", "").replace("{% endgeneration %}", "") for name, source in MARKING.items()}  # fmt: skip
INST = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 日本?"},
    {"role": "assistant", "content": "A country 👩‍👩‍👧 in the east."},
    {"role": "user", "content": "And what ends a turn?"},
    {"role": "assistant", "content": "The token <|im_end|> does."},
]
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"name": "look_up", "arguments": {"word": "turn"}}]}


@pytest.fixture
def chats(prepared: Prepare, write: Write) -> Callable[..., PreparedRun]:
    """Chats through a template that stands on the page: one row a document, so that rows and chats are the same."""

    def make(template: str, *records: Any, assistant_only_loss: bool = True, **data: Any) -> PreparedRun:
        tokens = json.loads(TOKENIZER.read_bytes())
        for at, each in enumerate(("<|begin|>", "<|start|>", "<|stop|>", "<|end|>")):
            swallows = each == "<|end|>"  # as the tokens of Phi 3 do
            tokens["added_tokens"].append(tokens["added_tokens"][0] | {"id": 4096 + at, "content": each, "rstrip": swallows})  # fmt: skip
        write(json.dumps(tokens), "t/tokenizer.json")
        write('{"eos_token": "<|endoftext|>"}', "t/tokenizer_config.json")
        write(template, "t/chat_template.jinja")
        write(lines(*({"messages": each} if isinstance(each, list) else each for each in records)), "a.jsonl")
        data = {"max_tokens": 256, "packing": "none", "shuffle": False, "eval_share": 0} | data
        set_ = ("model.tokenizer=t", "model.from_config.vocab_size=4352")
        return prepared("a.jsonl", set_=set_, assistant_only_loss=assistant_only_loss, **data)

    return make


def trained(run: PreparedRun, side: str = "train") -> list[list[str]]:
    """Of each row, what is trained: the stretches of its labels, as text."""
    blocks = run.phases[0].splits[side].index.blocks
    return [_stretches(blocks[at]["labels"], run.tokenizer) for at in range(len(blocks))]


def _stretches(labels: np.ndarray, tokenizer: Tokenizer) -> list[str]:  # type: ignore[type-arg]
    stretches = np.split(labels, np.flatnonzero(np.diff(labels != IGNORED)) + 1)
    return [tokenizer.reference.decode(each.tolist(), skip_special_tokens=False) for each in stretches if each[0] != IGNORED]  # fmt: skip


def store(run: PreparedRun) -> Any:
    return run.phases[0].train.stores[0]


# Which words ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("T-12")
@pytest.mark.parametrize("templates", [MARKING, PLAIN], ids=["with marks", "without"])
@pytest.mark.parametrize("name", MARKING)
def test_the_assistant_s_words_and_the_token_that_ends_its_turn_are_trained_and_nothing_else(
    chats: Callable[..., PreparedRun], name: str, templates: dict[str, str]
) -> None:
    end = "<|endoftext|>" if name == "Llama 3" else ""  # there the text ends with the turn, and so does the document
    assert trained(chats(templates[name], TURNS, [*TURNS[:2], CALLED])) == [
        ["A country 👩‍👩‍👧 in the east.<|im_end|>", f"The token <|im_end|> does.<|im_end|>{end}"],
        [f'[{{"name": "look_up", "arguments": {{"word": "turn"}}}}]<|im_end|>{end}'],
    ]
    (whole, _) = trained(chats(templates[name], TURNS, [*TURNS[:2], CALLED], assistant_only_loss=False))
    assert len(whole) == 1
    assert "Be brief." in whole[0], "the control: without the option all of it is"


def test_the_example_of_the_page_is_what_is_shown(prepared: Prepare, write: Write) -> None:
    page = (REPOSITORY / "dataset" / "README.md").read_text()
    section = page.split("\n## Chats\n")[1].split("\n## ")[0]
    write(re.findall(r"```jsonl\n(.*?)```", section, re.DOTALL)[0], "a.jsonl")
    run = prepared("a.jsonl", eval_share=0, packing="none", assistant_only_loss=True)
    block = shown_block(run, "phase_0:0").plain
    assert (
        re.findall(r"```text\n(⟦.*?)\n```", section, re.DOTALL)[0] == re.findall(r" ──\n(.*)\n── ", block, re.DOTALL)[0]
    )


def test_what_is_held_out_is_measured_by_the_same_words(chats: Callable[..., PreparedRun]) -> None:
    told = [[TURNS[1], {"role": "assistant", "content": f"answer {at}"}] for at in range(20)]
    run = chats(CHATML, *told, eval_share=0.3)
    held = trained(run, "eval")
    assert held
    assert all(words in [[f"answer {at}<|im_end|>"] for at in range(20)] for words in held + trained(run))


@pytest.mark.parametrize("name", MARKING)
def test_marks_of_a_template_are_read_as_transformers_reads_them(chats: Callable[..., PreparedRun], name: str) -> None:
    chats(MARKING[name], TURNS)
    turns = [*TURNS[:3], CALLED, *TURNS[1:3]]  # without one that quotes a special token, which for them is one
    theirs = AutoTokenizer.from_pretrained("t").apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)  # fmt: skip
    run = chats(MARKING[name], turns)
    count = len(theirs["input_ids"])
    assert store(run).ids[:count].tolist() == theirs["input_ids"]
    assert store(run).said[:count].astype(int).tolist() == theirs["assistant_masks"]
    assert 0 < sum(theirs["assistant_masks"]) < count, "the control"


def test_with_and_without_marks_the_same_words_are_found(chats: Callable[..., PreparedRun]) -> None:
    for name in MARKING:
        one, other = (store(chats(templates[name], TURNS)).said.tolist() for templates in (MARKING, PLAIN))
        assert one == other
    moved = CHATML.replace("{% generation %}{{ message.content }}", "{{ message.content }}{% generation %}")
    assert trained(chats(moved, TURNS[:3])) == [["<|im_end|>"]], "the control: marks are taken as they are"


def test_an_answer_that_no_token_ends_ends_with_the_document(chats: Callable[..., PreparedRun]) -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    run = chats(bare, [*TURNS[1:3], TURNS[3], {"role": "assistant", "content": "Nothing."}])
    assert trained(run) == [[" A country 👩‍👩‍👧 in the east.\n", " Nothing.\n<|endoftext|>"]]
    assert trained(chats(bare, TURNS[1:4])) == [[" A country 👩‍👩‍👧 in the east.\n"]], (
        "the control: a user has the last word"
    )


def test_a_header_without_a_prompt_of_its_own_is_told_where_there_is_none(chats: Callable[..., PreparedRun]) -> None:
    assert trained(chats(INST, TURNS[1:4])) == [[" A country 👩‍👩‍👧 in the east.<|endoftext|>"]]
    for header in ("answer: ", "A country "):  # also one that begins as the words do
        with pytest.raises(
            InputError, match=r"a.jsonl:1: messages: .* knows no add_generation_prompt, and may print a"
        ):
            chats(INST.replace("' ' + m", f"'{header}' + m"), TURNS[1:4])


def test_instructions_are_trained_by_their_answers(
    chats: Callable[..., PreparedRun], prepared: Prepare, write: Write
) -> None:
    record = {"instruction": "Name it.", "input": "x = 1", "output": "An assignment"}
    assert trained(chats(PLAIN["ChatML"], record)) == [["An assignment<|im_end|>"]]
    Path("t/chat_template.jinja").unlink()
    run = prepared("a.jsonl", set_=("model.tokenizer=t", "model.from_config.vocab_size=4352"), assistant_only_loss=True, eval_share=0)  # fmt: skip
    assert trained(run) == [["An assignment<|endoftext|>"]]


def test_a_token_that_is_half_a_header_is_not_trained(chats: Callable[..., PreparedRun]) -> None:
    """In use, the header is given and tokenised by itself, so that a model never gets to say such a token."""
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n\n{% else %}HEADER{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}HEADER{% endif %}"
    for blank, words in {" ": " thing<|endoftext|>", "\n": "a thing<|endoftext|>"}.items():  # the second: the control
        bare = template.replace("HEADER", f"{{{{ 'assistant:{blank}' }}}}")
        assert trained(chats(bare, [TURNS[1], {"role": "assistant", "content": "a thing"}])) == [[words]]


def test_a_special_token_that_swallows_blanks_still_ends_a_turn(chats: Callable[..., PreparedRun]) -> None:
    """Its place is asked of the reference, as its bytes are no longer those of the text."""
    for templates in (MARKING, PLAIN):
        run = chats(templates["ChatML"].replace("<|im_end|>", "<|end|>"), TURNS[:3])
        assert trained(run) == [["A country 👩‍👩‍👧 in the east.<|end|><|endoftext|>"]]
        assert _spelling(run.tokenizer.json)[4099] == b"<|end|>", "the control: it stands for more than its own bytes"
        assert run.tokenizer.reference.encode("<|end|>\n").ids == [4099]


@functools.cache
def of_the_sample(template: str, spelled: bool = True) -> Tokenizer:
    """Without its decoder nobody knows how its tokens are spelled, so that the reference is asked for their places."""
    tokenizer = load_tokenizer(str(SAMPLE), None, None, Path("none"))
    tokens = json.loads(tokenizer.json) | ({} if spelled else {"decoder": None})
    return replace(tokenizer, chat_template=template, json=json.dumps(tokens))


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<|im_end|>", "\U000f0000", "a\n"]
)


@pytest.mark.requirement("T-12")
@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.lists(WORDS, max_size=3).map("".join))),
    name=st.sampled_from(sorted(MARKING)),
)
def test_whatever_is_said_in_a_chat_the_labels_are_the_assistant_s_words(
    turns: list[tuple[str, str]], name: str
) -> None:
    """Blanks at the beginning of an answer may be one token with the header's end: here there are none."""
    chat = [{"role": role, "content": words.strip()} for role, words in turns]
    wanted = [f"{turn['content']}<|im_end|>" for turn in chat if turn["role"] == "assistant"]
    for template, spelled in itertools.product((MARKING[name], PLAIN[name]), (True, False)):
        tokenizer = of_the_sample(template, spelled)
        document = render({"messages": chat}, Rendering("messages", {}, False, assistant_only=True), tokenizer)
        if document is None:
            continue
        encoded = _encoded([document], Backend(tokenizer, "tokenizers", Proof()))
        mask = mask_of([document], encoded, tokenizer)
        assert len(mask) == len(encoded.ids)
        said = encoded.ids[mask].astype(np.int64).tolist()
        assert of_the_sample(template).reference.decode(said, skip_special_tokens=False) == "".join(wanted)


# What is not sure is refused -----------------------------------------------------------------------------------------

FORGETS = PLAIN["ChatML"].replace("' %}{{ message.content }}", "' %}{{ message.content if loop.last else '…' }}")


@pytest.mark.parametrize(
    ("template", "record", "problem"),
    [
        (FORGETS, TURNS, r"prints the chat up to and with messages\[2\] otherwise than at the beginning of the whole"),
        (PLAIN["ChatML"].replace("<|im_start|>assistant", "<|im_start|>assistant\n<think>"), TURNS, r"prints the chat up to messages\[2\] otherwise"),
        ("{{ messages[0].content }}" + PLAIN["ChatML"], [TURNS[2]], r"does not print the chat up to messages\[0\] by itself"),
        ("{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}", TURNS, "or marks it twice"),
        ("{% set x %}{% generation %}x{% endgeneration %}{% endset %}{{ x | length }}", TURNS, "looks into what it marks"),
        (CHATML, {"messages": None, "text": "raw"}, r"text: a text, and data.assistant_only_loss trains what the assistant says"),
        (CHATML, {"training_content": "raw"}, r"training_content: a text, .* set it in phases of chats alone"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_told_who_speaks_the_line_is_named(
    chats: Callable[..., PreparedRun], template: str, record: Any, problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as refused:
        chats(template, TURNS[:3] if "text" in str(record) else record, record)
    assert "a.jsonl:" in str(refused.value)
    chats(template, [TURNS[1]] if isinstance(record, list) else record, assistant_only_loss=False)  # the control


def test_sources_that_have_no_turns_are_refused(prepared: Prepare, write: Write) -> None:
    write(np.array([5, 6, 0], np.uint16).tobytes(), "a.bin")
    write('{"dtype": "uint16"}', "a.bin.meta.json")
    with pytest.raises(InputError, match=r"a.bin: tokens do not say who speaks, and data.assistant_only_loss"):
        prepared("a.bin", assistant_only_loss=True)
    prepared("a.bin", eval_share=0)  # the control


def test_chats_in_which_nobody_answers_are_counted_and_alone_they_are_refused(
    chats: Callable[..., PreparedRun], call: Call
) -> None:
    run = chats(CHATML, TURNS[:2], TURNS)
    assert (store(run).facts["silent"], trained(run)[0]) == (1, [])
    answer = call(
        "prepare", "-c", "run.json", "--set", "model.tokenizer=t", "--set", "model.from_config.vocab_size=4352"
    )
    assert "1 in which the assistant says nothing" in " ".join(answer.out.split())
    with pytest.raises(InputError, match=r"phase_0: the assistant says nothing in any of its chats, so .* no token"):
        chats(CHATML, TURNS[:2])


# What is kept of it --------------------------------------------------------------------------------------------------


def test_ids_split_and_keys_are_those_of_whole_chats_and_the_mask_is_sealed_beside_them(
    chats: Callable[..., PreparedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phased_cpt.data.files.PIECE_BYTES", 1000)
    told = [[*TURNS[:4], {"role": "assistant", "content": f"word {at} " * at}] for at in range(40)]
    whole, only = (chats(LLAMA, *told, assistant_only_loss=on, eval_share=0.2) for on in (False, True))
    for name in ("ids.bin", "offsets.npy", "digests.npy"):
        assert (store(whole).folder / name).read_bytes() == (store(only).folder / name).read_bytes()
    assert whole.phases[0].train.digests.tolist() == only.phases[0].train.digests.tolist()
    assert store(whole).folder != store(only).folder, "they are others to the cache"
    made = (store(only).folder / "said.bin").read_bytes()
    sealed = [json.loads((store(run).folder / "sealed.json").read_bytes()) for run in (whole, only)]
    assert (
        ["said.bin" in seal["files"] for seal in sealed]
        == ["said" in seal["facts"] for seal in sealed]
        == [False, True]
    )
    (store(only).folder / "said.bin").write_bytes(bytes(len(made)))
    assert (store(chats(LLAMA, *told, eval_share=0.2)).folder / "said.bin").read_bytes() == made, "damage is mended"


def test_the_account_the_block_and_the_rows_say_what_is_masked(
    chats: Callable[..., PreparedRun], call: Call, tmp_path: Path
) -> None:
    chats(CHATML, TURNS, packing="best_fit", max_tokens=128)
    how = ("-c", "run.json", "--set", "model.tokenizer=t", "--set", "model.from_config.vocab_size=4352")
    (phase,) = json.loads(call("prepare", *how, "--json").out)["phases"]
    figures = phase["splits"]["train"]
    assert figures["tokens_source"] == figures["tokens_trained"] + figures["tokens_masked"] + figures["tokens_first"]
    assert figures["tokens_masked"] > 0
    table = call("prepare", *how).out
    assert "masked" in table
    assert f" {figures['tokens_masked']} " in table
    shown = call("prepare", *how, "--inspect", "phase_0:0").out
    assert "assistant\n⟧A country 👩‍👩‍👧 in the east.<|im_end|>⟦\n<|im_start|>user" in shown
    call("prepare", *how, "--emit-jsonl", "rows")
    (row,) = map(json.loads, Path("rows/phase1_phase_0.train.jsonl").read_text().splitlines())
    assert sum(label != IGNORED for label in row["labels"]) == figures["tokens_trained"]
    answer = call("prepare", *how, "--emit-bin", "ids")
    assert answer.code == 2
    assert (
        "--emit-bin: phase1_phase_0.train: a .bin would hold ids, and not which of them the assistant says"
        in answer.err
    )
    assert "masked" not in call("prepare", *how, "--set", "data.assistant_only_loss=false").out, "the control"
    assert call("prepare", *how, "--set", "data.assistant_only_loss=false", "--emit-bin", "ids").code == 0


# Every token once ----------------------------------------------------------------------------------------------------


@st.composite
def masked(draw: st.DrawFn) -> tuple[Prepared, np.ndarray]:  # type: ignore[type-arg]
    capacity = draw(st.integers(2, 12))
    case = Prepared(
        lengths=draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)),
        capacity=capacity,
        overlap=draw(st.integers(0, capacity - 1)),
        packer=draw(st.sampled_from(sorted(PACKERS))),
        train_context=draw(st.booleans()),
        keep_order=draw(st.booleans()),
    )
    return case, np.array(draw(st.lists(st.booleans(), min_size=len(case.tokens), max_size=len(case.tokens))))


@pytest.mark.requirement("T-12", "K-04")
@given(case=masked())
def test_a_label_is_said_and_what_is_said_is_a_label_exactly_where_it_would_be_one(
    case: tuple[Prepared, np.ndarray],  # type: ignore[type-arg]
) -> None:
    """Whatever the lengths, the overlap and the packer: so each is trained once, as it is without the option."""
    plain, said = case
    only = Blocks([plain.tokens], plain.packed.slices, plain.packed.first, plain.shape, [said])
    whole = Blocks([plain.tokens], plain.packed.slices, plain.packed.first, plain.shape, [None])
    labels = 0
    for at in range(len(only)):
        here = plain.packed.slices[slice(*plain.packed.first[at : at + 2])]
        places = np.concatenate([np.arange(each) + start for start, each in zip(here.start, here.length, strict=True)])
        row, ever = only[at]["labels"], whole[at]["labels"]
        assert (row[: len(places)] == np.where(said[places], ever[: len(places)], IGNORED)).all()
        assert (row[len(places) :] == IGNORED).all()
        labels += int((row != IGNORED).sum())
    lengths = np.diff(np.flatnonzero(plain.tokens == EOS) + 1, prepend=0)
    documents = type(plain.packed.slices).of_documents(np.zeros_like(lengths), np.cumsum(lengths) - lengths, lengths)
    account = account_of(documents, documents, plain.packed, plain.shape, [said])  # proves its identities
    assert (account.tokens_trained, account.tokens_masked) == (labels, plain.account.tokens_trained - labels)
    assert account_of(documents, documents, plain.packed, plain.shape, [None]) == plain.account, "the control"


def test_a_store_without_a_mask_beside_one_with_is_trained_whole() -> None:
    case = Prepared([3, 3], 6)
    slices = type(case.packed.slices).of_documents(np.array([0, 1]), np.array([0, 0]), np.array([3, 3]))
    stores = [np.array([10, 11, EOS]), np.array([20, 21, EOS])]
    row = Blocks(stores, slices, np.array([0, 2]), case.shape, [np.array([False, True, False]), None])[0]
    assert row["labels"].tolist() == [IGNORED, 11, IGNORED, IGNORED, 21, EOS]


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=30),
    stretches=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 30)), max_size=8),
)
def test_stretches_that_are_counted_at_once_are_those_counted_one_by_one(
    mask: list[bool], stretches: list[tuple[int, int]]
) -> None:
    start = np.array([min(begin, len(mask)) for begin, _ in stretches], np.int64)
    length = np.array([min(many, len(mask) - min(begin, len(mask))) for begin, many in stretches], np.int64)
    expected = [sum(mask[begin : begin + many]) for begin, many in zip(start, length, strict=True)]
    assert counted(np.array(mask), start, length).tolist() == expected
