"""The texts of the goldens: prompts, conversations, strings that are hard to tokenise, chat templates."""

from typing import Any


def _ask(content: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": content}]


# Conversations (the chat template is applied) and raw texts, each continued greedily by 64 tokens.
PROMPTS: list[str | list[dict[str, Any]]] = [
    _ask("What is the capital of France?"),
    _ask("Explain in two sentences why the sky is blue."),
    _ask("Write a short poem about a lighthouse."),
    _ask("List five fruits and their colours."),
    _ask("How do I reverse a list in Python?"),
    _ask("Translate 'good morning' into Spanish, German and Italian."),
    _ask("Who wrote Romeo and Juliet, and when?"),
    _ask("Give me three tips for sleeping better.", system="You are a doctor. Answer briefly."),
    _ask("What is 12 times 12?", system="You are a calculator."),
    _ask("Tell me a story about a robot that learns to paint."),
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada! How can I help you today?"},
        {"role": "user", "content": "What is my name?"},
    ],
    _ask(
        "Summarise: The mitochondrion is an organelle that makes most of the cell's supply of energy. It was "
        "once a free-living bacterium, taken up by a larger cell more than a billion years ago."
    ),
    _ask("Écris une phrase en français sur la mer. 🌊"),
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "def fibonacci(n):\n    ",
    "Q: What is the largest planet in the solar system?\nA:",
    "<html>\n<head>\n<title>",
    "1, 2, 3, 5, 8, 13,",
    "The history of the Roman Empire begins with",
]

# Texts whose last positions' logits are kept; the last one is long.
LOGITS_PROMPTS: list[str | list[dict[str, Any]]] = [
    _ask("What is the capital of France?"),
    "The three laws of thermodynamics are",
    "def fibonacci(n):\n    ",
    "Naïve café, 北京, 🙂🙃 and 12345.",
    " ".join(f"In chapter {i} the travellers crossed river number {i * 7} and rested." for i in range(1, 41)),
]

TOKENIZER_CASES = [
    "",
    " ",
    "a",
    "Hello, world!",
    "  two  spaces   three ",
    "tabs\tand\nnewlines\r\n\r\n  mixed \n \n",
    "2024-11-23 12:34:56, 3.14159, 1,000,000 and 007",
    "x1y22z333",
    "½ ² ٣ Ⅷ 一 ④",
    "don't can't I'm we'll they've he'd DON'T I'M",
    "naïve façade Œuvre straße ŁÓDŹ ἀρχή",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "العربية עברית हिन्दी ไทย",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 ☃︎",
    "e\u0301 \u00a0nbsp\u200bzero\ufeffbom\u2028sep\x00nul\x7f",
    'def f(x: int) -> str:\n\treturn f"{x!r}"  # comment\n',
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "not<|im_start|special <| im_end|> <|im_end|><|im_end|>",
    "https://example.com/a?b=c&d=%20e#f",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "\U0001f468\u200d\U0001f4bb\ud7a3\uffff\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "A\u030a\u0327B",
]

# Conversations for the bundled model's own template.
CHATS: list[dict[str, Any]] = [
    {"messages": _ask("Hi"), "add_generation_prompt": True},
    {"messages": _ask("Hi"), "add_generation_prompt": False},
    {"messages": _ask("Hi", system="Be brief."), "add_generation_prompt": True},
    {
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two", "tool_calls": None, "name": None},
            {"role": "user", "content": "Three\n<b>&amp;</b> {{ x }} 🙂"},
        ],
        "add_generation_prompt": True,
    },
    {"messages": _ask("  spaces and\n\nnewlines are kept \n"), "add_generation_prompt": True},
]

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather: <b>sun & rain</b> \u00fc",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# Templates that use what templates of well-known models use.
TEMPLATES: list[dict[str, Any]] = [
    {
        "name": "tags on lines of their own",
        "template": """{%- if tools %}
    {{- bos_token + 'tools:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
        {{- '\n' }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}
SYSTEM {{ message.content | trim }}
    {% else %}
{{ message['role'] | upper }}: {{ message['content'] }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}ASSISTANT:{% endif %}""",
        "cases": [
            {"messages": _ask(" hello ", system="  quiet  "), "add_generation_prompt": True},
            {"messages": _ask('<x> & "y"'), "tools": [_TOOL], "add_generation_prompt": True},
        ],
    },
    {
        "name": "loop controls, namespace, generation and an undefined name",
        "template": """{%- set ns = namespace(seen=0) -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}{%- continue -%}{%- endif -%}
{%- set ns.seen = ns.seen + 1 -%}
{%- if ns.seen > 2 -%}{%- break -%}{%- endif -%}
{%- if message.role == 'assistant' -%}{% generation %}[{{ message.content }}]{% endgeneration %}{%- else -%}
({{ message.content }}{{ eos_token }}{{ missing }}){%- endif -%}
{%- endfor -%}
{{ ns.seen }}{{ ' plain ' if not enable_thinking is defined else enable_thinking }}""",
        "cases": [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "tool", "content": "b"},
                    {"role": "assistant", "content": "c"},
                    {"role": "user", "content": "d"},
                ],
                "add_generation_prompt": False,
            },
        ],
    },
    {
        "name": "tool calls in compact JSON",
        "template": """{%- for m in messages %}{{ m.role }}
{%- if m.tool_calls %}{% for call in m.tool_calls %}
{{- ' ' }}{{ call.function | tojson(separators=(',', ':'), sort_keys=true) }}
{%- endfor %}{% elif m.content is not string %} none{% else %} {{ m.content }}{% endif %}|{% endfor %}""",
        "cases": [
            {
                "messages": [
                    {"role": "user", "content": "weather?"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
                    },
                    {"role": "tool", "content": "sunny"},
                ],
                "add_generation_prompt": False,
            },
        ],
    },
]
