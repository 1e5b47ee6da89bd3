"""The streams of a drill: chats of different lengths, greedy and sampled, drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

SYSTEMS = (
    None,
    "You are a patient teacher. Answer in short sentences.",
    "Answer as the captain of a ship would, and never leave that role.",
)
QUESTIONS = (
    "Tell me a story about a lighthouse.",
    "What is the capital of France?",
    "List the planets of the solar system, nearest first, with one fact each.",
    "Write a Python function that reverses a string, and explain it.",
    "Explain why the sky is blue to a child of six.",
    "Schreibe einen Satz auf Deutsch und übersetze ihn ins Englische.",
    "Write a haiku about autumn, then the same in Japanese: 秋の俳句を書いてください。",
    "Use as many different emoji as you can to describe a day at the beach 🏖️.",
    "How do I boil an egg?",
    "Give me ten names for a cat, one on each line.",
)
NOTES = (
    "The harbour was quiet that morning, and the only sound came from the ropes that the wind moved against the masts.",
    "A woman in a yellow coat counted the boats twice, wrote down the number, and shook her head.",
    "All deliveries are to be made to the back entrance between six and nine. Signatures are needed above 20 kg.",
    "Pallets that arrive damaged are photographed before they are moved, without exception.",
    "In the third experiment the temperature was raised by two degrees every hour. Growth stopped at 41 degrees in all",
    "samples but one, which had been stored next to the window and was excluded.",
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.1},
    {"temperature": 1.3, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.5},
)
MAX_TOKENS = (8, 64)
LARGEST_GROUP = 4


def draw_group(rng: random.Random, model: str) -> list[dict[str, Any]]:
    """One to four requests to be run at once, half of them greedy."""
    return [draw(rng, model) for _ in range(rng.randint(1, LARGEST_GROUP))]


def draw(rng: random.Random, model: str) -> dict[str, Any]:
    """One chat request, complete but for its cache salt."""
    notes = rng.sample(NOTES, rng.choice((0, 0, 0, 2, 4, 6)))
    question = rng.choice(QUESTIONS)
    content = "\n".join(["Keep these notes in mind.", *notes, question]) if notes else question
    messages = [{"role": "user", "content": content}]
    if system := rng.choice(SYSTEMS):
        messages.insert(0, {"role": "system", "content": system})
    sampling = {"temperature": 0.0} if rng.random() < 0.5 else rng.choice(SAMPLINGS)
    return {
        "model": model,
        "messages": messages,
        "max_tokens": rng.randint(*MAX_TOKENS),
        "seed": rng.getrandbits(31),
        **sampling,
    }
