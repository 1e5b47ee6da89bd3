"""Conversations whose answers are hard to tell apart, and templates in the manner of several models."""

from __future__ import annotations

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3+3?"},
        {"role": "assistant", "content": "6"},
        {"role": "user", "content": "thanks"},
    ],
    # The same words on both sides, and words of the template inside an answer.
    [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "user\nassistant\nassistant"},
    ],
    # White space at the edges, which a tokenizer may join to what stands beside it.
    [
        {"role": "user", "content": "list  \n\n"},
        {"role": "assistant", "content": "1. one\n2. two\n\n"},
        {"role": "user", "content": "\tmore"},
        {"role": "assistant", "content": "3. three  "},
    ],
    [{"role": "user", "content": "say nothing"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "日本語?"}, {"role": "assistant", "content": "はい、🙂👩‍👩‍👧 naïve — ½"}],
    [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "first"},
        {"role": "assistant", "content": "second"},
    ],
]

_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}"
    "{% else %}{{message['content'] + '<|im_end|>' + '\n'}}{% endif %}"
)


def marked_template(template: str) -> str:
    """SmolLM2's template, with the marks that transformers needs to see an answer."""
    assert _TURN in template
    return template.replace(_TURN, _MARKED)


TRIMMED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content | trim }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
"""Llama 3's manner: content without white space at its edges, and nothing between turns."""

THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Qwen3's manner: an empty thought is written into the last answer only, so it changes when the chat goes on."""

ASKS_FOR_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""DeepSeek's manner: it asks with the beginning of a thought, which is not kept."""

PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
"""No special token anywhere."""

FORGETFUL = (
    "{% for m in messages %}{% if not loop.first or loop.last %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Leaves the first message out once the conversation goes on."""

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
