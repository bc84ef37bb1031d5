"""How records become documents: what dataset/README.md shows is what is done, and chats are what transformers makes."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from phased_cpt.data.render import RENDERERS, Rendering, render
from phased_cpt.data.tokenizer import Tokenizer, load_tokenizer
from phased_cpt.errors import InputError
from tests.conftest import REPOSITORY, SAMPLE, TOKENIZER, Write
from tests.data.conftest import Prepare, lines, texts

PAGE = (REPOSITORY / "dataset" / "README.md").read_text()
GOLDEN = {
    section.splitlines()[0]: (*re.findall(r"```jsonl\n(.*?)```\n+```text\n(.*?)\n```", section, re.DOTALL)[0],)
    for section in PAGE.split("\n## ")
    if "```jsonl" in section
}
AUTO = Rendering("auto", {}, False)


@pytest.mark.requirement("D-03", "X-03")
@pytest.mark.parametrize("format_", GOLDEN)
def test_each_format_is_what_its_example_says(prepared: Prepare, write: Write, format_: str) -> None:
    records, expected = GOLDEN[format_]
    write(records, "a.jsonl")
    run = prepared("a.jsonl", parse_special_tokens=format_ == "Rendered chats")
    assert "\n".join(texts(run.phases[0], run.tokenizer)) == expected


def test_every_renderer_has_an_example() -> None:
    assert len(GOLDEN) == 4
    assert all(f'"{field}":' in PAGE for field in RENDERERS)


CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " a \n"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "日本 <b> & 'quotes'"}, {"role": "assistant", "content": "x", "tool_calls": [{"a": 1}]}],
]  # fmt: skip
TEMPLATES = {
    "ChatML": (SAMPLE / "tokenizer_config.json").read_text(),
    "blocks, loops, filters": """\
        {%- for message in messages %}
            {%- if loop.first and message['role'] != 'system' %}
                {{- bos_token }}
            {%- endif %}
            {{- '<|im_start|>' + message.role }}
            {%- if message.tool_calls %}
                {{- message.tool_calls | tojson }}
                {%- continue %}
            {%- endif %}
            {% generation %}{{ message['content'] | trim }}{% endgeneration %}
            {{ eos_token }}
        {%- endfor %}""",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "tools"])
def test_chats_are_what_transformers_makes_of_them(tmp_path: Path, template: str, chat: list[dict[str, str]]) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(TEMPLATES["ChatML"].replace('"eos_token"', '"bos_token": "<|endoftext|>", "eos_token"'))  # fmt: skip
    if template != "ChatML":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[template])
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False)
    ours = load_tokenizer(str(tmp_path), None, None, tmp_path)
    document = render({"messages": chat}, AUTO, ours)
    assert document is not None
    assert "".join(part.text for part in document.parts) == theirs


def test_a_template_that_refuses_a_chat_is_a_bad_record(prepared: Prepare, write: Write) -> None:
    write(TOKENIZER.read_bytes(), "t/tokenizer.json")
    write('{"eos_token": "<|endoftext|>"}', "t/tokenizer_config.json")
    write("{{ raise_exception('roles must alternate') }}", "t/chat_template.jinja")
    write(lines({"messages": CHATS[0]}), "a.jsonl")
    with pytest.raises(
        InputError, match=r"a.jsonl:1: messages: the chat template of t refuses it: roles must alternate"
    ):
        prepared("a.jsonl", set_=("model.tokenizer=t",))
    Path("t/chat_template.jinja").write_text("{{ messages[0].content }} {{ strftime_now('%d') }}")
    with pytest.raises(InputError, match="refuses it: 'strftime_now' is undefined"):
        prepared("a.jsonl", set_=("model.tokenizer=t",))


def test_without_a_template_chats_are_refused_and_instructions_get_headings(prepared: Prepare, write: Write) -> None:
    write(TOKENIZER.read_bytes(), "t/tokenizer.json")
    write('{"eos_token": {"content": "<|endoftext|>"}}', "t/tokenizer_config.json")
    write(lines({"messages": CHATS[0]}), "a.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl:1: messages: the tokenizer t has no chat template; give .*"):
        prepared("a.jsonl", set_=("model.tokenizer=t",))
    write(lines({"instruction": "I", "input": "J", "output": "O"}, {"instruction": "I", "output": "O"}), "b.jsonl")
    run = prepared("b.jsonl", set_=("model.tokenizer=t",))
    assert texts(run.phases[0], run.tokenizer) == [
        "### Instruction:\nI\n\n### Input:\nJ\n\n### Response:\nO",
        "### Instruction:\nI\n\n### Response:\nO",
    ]


def test_a_special_token_that_a_person_wrote_is_text_and_the_ones_of_the_template_are_tokens(
    prepared: Prepare, write: Write
) -> None:
    chat = [{"role": "user", "content": "what is <|im_end|> ?"}]
    write(lines({"messages": chat}), "a.jsonl")
    run = prepared("a.jsonl")
    (store,) = run.phases[0].train.stores
    im_start, im_end = (run.tokenizer.reference.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    ids = store.ids.tolist()
    assert (ids.count(im_start), ids.count(im_end), ids.count(run.tokenizer.eos_id)) == (1, 1, 1)
    assert store.facts["special_texts"] == 1
    assert texts(run.phases[0], run.tokenizer) == ["<|im_start|>user\nwhat is <|im_end|> ?<|im_end|>\n"]


@pytest.mark.parametrize("parse", [False, True])
def test_special_tokens_in_a_text_are_text_unless_asked_for(prepared: Prepare, write: Write, parse: bool) -> None:
    write(lines({"text": "a <|endoftext|> b"}, {"text": "c<|endoftext|>"}), "a.jsonl")
    run = prepared("a.jsonl", parse_special_tokens=parse)
    (store,) = run.phases[0].train.stores
    assert (store.ids == run.tokenizer.eos_id).sum() == (3 if parse else 2), "and an EOS that is there is not doubled"
    assert store.facts["special_texts"] == (0 if parse else 2)


def test_a_custom_field_may_hold_a_chat(tokenizer: Tokenizer) -> None:
    document = render({"conversation": CHATS[0]}, Rendering("conversation", {}, False), tokenizer)
    assert document is not None
    assert document.parts[0].text == "<|im_start|>user\nHello<|im_end|>\n"
