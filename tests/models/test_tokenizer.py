"""Tokens and conversations: the bundled tokenizer against transformers, SentencePiece against the original library."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.models import ChatTemplateError, ConfigError, ModelConfig, Tokenizer, TokenizerError
from anypool.models.gguf_tokenizer import tokenizer_files
from tests.goldens import tiny
from tests.models.conftest import GOLDENS

CHATS = json.loads((GOLDENS / "chats.json").read_text())
TOKENS = json.loads((GOLDENS / "smollm2_tokens.json").read_text())
SENTENCEPIECE = json.loads((GOLDENS / "sentencepiece.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """The golden SentencePiece model as it would come out of a GGUF file."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SENTENCEPIECE["pieces"],
        "tokenizer.ggml.scores": SENTENCEPIECE["scores"],
        "tokenizer.ggml.token_type": SENTENCEPIECE["kinds"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }

    def require(key, kind=int):
        assert isinstance(values[key], kind)
        return values[key]

    config = ModelConfig.from_hf(tiny.VARIANTS["llama2"] | {"vocab_size": len(SENTENCEPIECE["pieces"])})
    metadata = SimpleNamespace(path="model.gguf", get=values.get, require=require)
    for name, content in tokenizer_files(metadata, config).items():
        (directory / name).write_text(json.dumps(content))
    return Tokenizer.load(directory)


def test_ids_of_the_bundled_model(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2,))
    assert tokenizer.named_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: ascii(case["text"][:20]))
def test_as_transformers_tokenises(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("case", SENTENCEPIECE["cases"], ids=lambda case: ascii(case["text"][:20]))
def test_as_sentencepiece_tokenises(sentencepiece, case):
    assert sentencepiece.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert sentencepiece.encode(case["text"]) == [1, *case["ids"]]
    assert sentencepiece.decode(case["ids"]) == case["decoded"]


def test_digits_stand_alone(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("In 2024")] == ["In", " ", "2", "0", "2", "4"]


# Six control characters and the unassigned planes hold bytes for which this vocabulary has no token: they
# vanish.
@given(text=st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_tokens_are_left_out_on_request(tokenizer):
    ids = tokenizer.encode("Hello<|im_end|>")
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, skip_special=False) == "Hello<|im_end|>"


def test_ids_beyond_the_vocabulary_stand_for_nothing(tokenizer):
    assert tokenizer.decode([19556, 60000]) == "Hello"


def test_the_json_of_a_tokenizer_makes_the_same_one(tokenizer, smollm2, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    again = Tokenizer.load(tmp_path)
    assert again.encode("Hello, 12 wörlds 🙂<|im_end|>") == tokenizer.encode("Hello, 12 wörlds 🙂<|im_end|>")


@pytest.mark.parametrize("case", CHATS["smollm2"])
def test_conversations_of_the_bundled_model(tokenizer, case):
    rendered = tokenizer.render_chat(case["messages"], add_generation_prompt=case["add_generation_prompt"])
    assert rendered == case["rendered"]


@pytest.mark.parametrize("item", CHATS["templates"], ids=lambda item: item["name"])
def test_templates_see_what_transformers_gives_them(smollm2, tmp_path, item):
    write(smollm2, tmp_path, {"chat_template": item["template"]} | item["named_tokens"])
    tokenizer = Tokenizer.load(tmp_path)
    for case in item["cases"]:
        arguments = {key: case[key] for key in case if key != "rendered"}
        assert tokenizer.render_chat(**arguments) == case["rendered"]


def write(smollm2, directory, settings):
    (directory / "tokenizer.json").symlink_to(smollm2 / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_where_templates_are_found(smollm2, tmp_path):
    write(
        smollm2,
        tmp_path,
        {"chat_template": [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]},
    )
    assert Tokenizer.load(tmp_path).render_chat(MESSAGES) == "one"
    assert Tokenizer.load(tmp_path).render_chat(MESSAGES, tools=[{"name": "f"}]) == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ now }}")
    assert Tokenizer.load(tmp_path).render_chat(MESSAGES, now="noon") == "three noon"
    assert Tokenizer.load(tmp_path).render_chat(MESSAGES, tools=[{"name": "f"}]) == "two"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the model's chat template is broken at line 1: "),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the model's chat template rejects the messages: roles must alternate",
        ),
        ("{{ messages[0].content.name.first }}", "the model's chat template rejects the messages: "),
        (
            "{{ messages[0].content + 1 }}",
            "the model's chat template cannot render the messages (TypeError: can only concatenate str",
        ),
        ("{{ ''.__class__.__mro__ }}", "the model's chat template rejects the messages: access to attribute"),
        ("{{ messages.append(1) }}", "the model's chat template rejects the messages: "),
    ],
)
def test_templates_that_fail(smollm2, tmp_path, template, message):
    write(smollm2, tmp_path, {"chat_template": template})
    with pytest.raises(ChatTemplateError) as raised:
        Tokenizer.load(tmp_path).render_chat(MESSAGES)
    assert str(raised.value).startswith(message)


def test_no_template(smollm2, tmp_path):
    write(smollm2, tmp_path, {})
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(ChatTemplateError, match="the model has no chat template: use the completions endpoint"):
        tokenizer.render_chat(MESSAGES)


def test_messages_are_not_changed(tokenizer):
    messages = [{"role": "user", "content": "Hi", "name": None}]
    tokenizer.render_chat(messages)
    assert messages == [{"role": "user", "content": "Hi", "name": None}]


def test_tokens_named_as_objects_and_ending_tokens_without_a_configuration(smollm2, tmp_path):
    write(smollm2, tmp_path, {"eos_token": {"content": "<|im_end|>", "special": True}, "bos_token": None})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.bos_id is None


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(TokenizerError) as raised:
        Tokenizer.load(tmp_path)
    assert str(raised.value) == f"{tmp_path} has no tokenizer.json"
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match=r"make it from its tokenizer\.model with transformers"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer: "):
        Tokenizer.load(tmp_path)


def test_broken_settings(smollm2, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(smollm2 / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.load(tmp_path)
