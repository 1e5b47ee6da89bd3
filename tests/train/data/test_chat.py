"""Which tokens of a conversation are learned: against transformers, and by hand for other models' manners."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anypool.train.data import DataError, TextTokenizer
from anypool.train.data.chat import learned, render
from tests.train.data import chats
from tests.train.data.conftest import byte_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "chat_masks.json").read_text(encoding="utf-8"))["conversations"]


def masked(tokenizer, messages):
    """(ids, mask) of a conversation."""
    conversation = render(tokenizer.model, "here", {"messages": messages})
    encoding = tokenizer.core.encode(conversation.text, add_special_tokens=False)
    return encoding.ids, learned(conversation, encoding.ids, encoding.offsets, tokenizer.endings)


def answers(tokenizer, messages):
    """The learned parts as texts."""
    ids, mask = masked(tokenizer, messages)
    parts, last = [], False
    for id, one in zip(ids, mask, strict=True):
        if one and not last:
            parts.append([])
        if one:
            parts[-1].append(id)
        last = bool(one)
    return [tokenizer.model.decode(part, skip_special=False) for part in parts]


def turns(*contents):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


@pytest.fixture
def with_template(tmp_path):
    return lambda template: TextTokenizer.load(byte_tokenizer(tmp_path / "tokenizer", template))


@pytest.mark.parametrize("index", range(len(chats.CONVERSATIONS)))
def test_as_transformers_has_it(smollm2, index):
    ids, mask = masked(smollm2, chats.CONVERSATIONS[index])
    assert list(ids) == GOLDEN[index]["ids"]
    assert mask.astype(int).tolist() == GOLDEN[index]["mask"]


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(WORDS, min_size=2, max_size=6))
def test_answers_come_back_whole(smollm2, contents):
    """Whatever is said: what is learned is what the assistant said, token by token, with the end of its turn.

    Where an answer begins with white space its first tokens may be joined to the template's, and are then not learned.
    """
    said = contents[1::2]
    # SmolLM2 lacks some bytes of rare characters.
    assume(all(smollm2.model.decode(smollm2.model.encode(text)) == text for text in said))
    for answer, content in zip(answers(smollm2, turns(*contents)), said, strict=True):
        assert answer.endswith("<|im_end|>")
        assert f"{content}<|im_end|>".endswith(answer)
        if not content[0].isspace():
            assert answer == f"{content}<|im_end|>"


def test_trimmed_content(with_template):
    tokenizer = with_template(chats.TRIMMED)
    assert answers(tokenizer, turns("a", "  b c \n", "d", "e")) == ["b c<|im_end|>", "e<|im_end|>"]


def test_a_thought_that_only_the_last_answer_has(with_template):
    tokenizer = with_template(chats.THINKING)
    last = "<think>\n\n</think>\n\nsix<|im_end|>"
    assert answers(tokenizer, turns("a", "four", "b", "six")) == ["four<|im_end|>", last]


def test_asked_with_more_than_is_kept(with_template):
    tokenizer = with_template(chats.ASKS_FOR_THOUGHT)
    assert answers(tokenizer, turns("a", "four", "b", "six")) == ["four<|im_end|>", "six<|im_end|>"]
    # What the question already ends with is not learned.
    assert answers(tokenizer, turns("a", "<think>\nhm</think>four")) == ["hm</think>four<|im_end|>"]


def test_no_special_tokens(with_template):
    assert answers(with_template(chats.PLAIN), turns("a", "four", "b", "six")) == ["four\n", "six\n"]


def test_tool_calls_need_no_content(with_template):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}|{{ m.tool_calls | tojson if m.tool_calls else m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant|{% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": ["f"]}]
    assert answers(with_template(template), messages) == ['["f"]<|im_end|>']


def test_the_date_is_always_the_same(with_template):
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    conversation = render(with_template(template).model, "here", {"messages": turns("a", "b")})
    assert conversation.text == "2024-07-26ab"


BAD = [
    (chats.ALTERNATING, [], "here: no messages"),
    (chats.ALTERNATING, "hi", "here: no messages"),
    (chats.ALTERNATING, None, "here: no messages"),
    (chats.ALTERNATING, ["hi"], "here: message 1 has no role"),
    (chats.ALTERNATING, [{"content": "a"}], "here: message 1 has no role"),
    (chats.ALTERNATING, [{"role": "user"}], "here: message 1 (user) has no content that is text"),
    (chats.ALTERNATING, [{"role": "user", "content": 3}], "here: message 1 (user) has no content that is text"),
    (chats.ALTERNATING, turns("a"), "here: no message has the role 'assistant' (roles: user), so there is"),
    (chats.ALTERNATING, turns("a", "b")[::-1], "here: the first message is the assistant's; put the user's"),
    (chats.ALTERNATING, [*turns("a"), *turns("b", "c")], "here: the model's chat template rejects the messages: Conv"),
    ("", turns("a", "b"), "here: the model has no chat template"),
    (chats.FORGETFUL, turns("a", "b"), "here: the model's chat template changes what came before message 2"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "expected"), BAD)
def test_bad_conversations(with_template, template, messages, expected):
    with pytest.raises(DataError) as caught:
        masked(with_template(template), messages)
    assert str(caught.value).startswith(expected)


def test_an_answer_without_end(with_template):
    plain = chats.THINKING.replace("<|im_end|>", "").replace("<|im_start|>", "### ")
    with pytest.raises(DataError, match="its end cannot be found"):
        masked(with_template(plain), turns("a", "four", "b", "six"))
