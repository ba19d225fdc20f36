"""Prompts that differ in length, language and script."""

from __future__ import annotations

from pathlib import Path

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 100, 257, 511, 512, 513, 1030, 1500)
"""In tokens: around blocks of 16, around chunks of 512, and long."""

CHATS = (
    "What is the capital of France?",
    "Write a haiku about rain on a tin roof.",
    "Explain in two sentences why the sky is blue.",
    "Qu'est-ce qu'un nombre premier ? Réponds en une phrase.",
    "Nenne drei Städte in Österreich.",
    "¿Cuántos planetas hay en el sistema solar?",
    "日本の首都はどこですか。",
    "Сколько будет двенадцать умножить на двенадцать?",
    "ما هي عاصمة مصر؟",
    "नमस्ते! आप कैसे हैं?",
    "Fix this: def f(x):\n    retrun x ** 2\n",
    "SELECT name, COUNT(*) FROM users GROUP BY name; -- what does it do?",
    "🙂🙃 What do these two emoji have in common? 👩‍👩‍👧‍👦",
    "List the numbers from 1 to 10, separated by commas.",
    "   leading and trailing spaces, and\ttabs   ",
)


def long_text() -> str:
    """Several thousand tokens of English that is in this repository anyway."""
    root = Path(__file__).parents[2]
    return (root / "LICENSE").read_text()
