"""Texts for load: the same for the same seed, different from their first words on otherwise.

Every word is one token of SmolLM2 (a test counts them) and of most other byte-level
vocabularies, so a document has the length in tokens that was asked for, give or take a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

Message = dict[str, str]

_WORDS = """
    river mountain garden winter summer market letter window bridge forest island village
    castle harbor engine signal copper silver paper stone metal glass cotton bread butter
    sugar coffee orange apple lemon pepper salt water fire wind storm cloud rain snow ice
    morning evening night day week month year hour minute doctor teacher student farmer
    sailor soldier driver writer painter singer king queen prince child mother father brother
    sister friend neighbor stranger guest judge lawyer merchant red green blue yellow white
    black gray brown golden bright dark quiet loud heavy light narrow wide deep shallow early
    late slow quick gentle rough smooth sharp round square empty full young old new ancient
    modern simple complex common rare walk run carry bring take give build break open close
    begin end watch listen speak write read count measure weigh cross follow lead leave enter
    reach climb fall rise turn move stay wait hope fear love trust doubt know learn teach near
    far above below under over between behind before after during through across along around
    within without and but or so because while when where although until since unless one two
    three four five six seven eight nine ten hundred thousand first second third last next
    another every several many few house road field lake sea coast valley hill tree leaf
    flower seed root bird fish horse dog cat sheep wolf bear ship boat train wheel wagon map
    clock book story song picture question answer reason method result number table science
    history music language weather trade travel food health money power order peace law city
    country border
"""
WORDS = tuple(_WORDS.split())

_OPENINGS = (
    "What can you tell me about a {} and a {}?",
    "Write a short story in which a {} meets a {}.",
    "How would you explain the difference between {} and {} to a child?",
    "Give me three ideas that have to do with {} and {}.",
)
_FOLLOW_UPS = (
    "Tell me more about the {}.",
    "And what about the {}?",
    "Say that again, but with a {} in it.",
    "Why did you not mention the {}?",
)
_DOCUMENT_QUESTIONS = (
    "What does the text say about the {}?",
    "Which part of the text is about the {}? Answer in one sentence.",
    "Is there a {} in the text?",
)


def rng(*name: object) -> Random:
    """Random numbers that are a function of ``name``, on every machine."""
    return Random("/".join(map(str, name)))


def document(random_: Random, num_tokens: int) -> str:
    """Sentences of random words, about ``num_tokens`` tokens long."""
    return " ".join(_sentences(random_, num_tokens))


def _sentences(random_: Random, num_tokens: int) -> Iterator[str]:
    while num_tokens > 0:
        num_words = max(1, min(random_.randint(8, 14), num_tokens - 1))
        yield " ".join(random_.choices(WORDS, k=num_words)) + "."
        num_tokens -= num_words + 1


def opening(random_: Random) -> str:
    """A short question that begins a chat."""
    return random_.choice(_OPENINGS).format(*random_.sample(WORDS, 2))


def follow_up(random_: Random) -> str:
    """A short question for a later turn of it."""
    return random_.choice(_FOLLOW_UPS).format(random_.choice(WORDS))


def document_opening(random_: Random, num_tokens: int) -> str:
    """A document of ``num_tokens`` tokens, and a question about it."""
    return document(random_, num_tokens) + "\n\n" + document_question(random_)


def document_question(random_: Random) -> str:
    """A question about a document given before."""
    return random_.choice(_DOCUMENT_QUESTIONS).format(random_.choice(WORDS))
