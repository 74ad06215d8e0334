"""The gold score: how good an answer truly is, read from the two texts alone.

It is for reports only: no training, no alarm, no stop and no choice of a checkpoint may use it. Voters see it through
noise (`synthetic_crowd.py`).

    gold = 0                                         off the subject: no value of the asked topic, or mostly no words
    gold =                    0.1 tone + 0.1 brief   a wrong value, or several values
    gold = 0.6 + 0.2 reason + 0.1 tone + 0.1 brief   the right value and no other

    reason  1 if the answer gives the reason of the right value, or a second true fact about the plant; 0 if it gives
            neither, or a second fact that is false
    tone    0 if the answer is rude, else 1 if it is friendly, else one half
    brief   1 up to 16 words, falling evenly to 0 at 40; 0 if it says the same four words twice

So style alone cannot pass 0.2, an answer that names every value gets no more than a wrong one, and padding costs a
little. What is said in a sentence about another plant only, or behind "not" and its like, does not count as said of the
asked one. What it cannot see: whether the words around a value make a sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from stackllama.data.synthetic.world import (
    ANY_TOPIC,
    CONTEXT,
    EVASIVE,
    FACTS,
    FILLER,
    FRIENDLY_WORDS,
    INTRODUCTIONS,
    NOTES,
    PLANTS,
    POLITE,
    RUDE,
    RUDE_WORDS,
    TOPICS,
)

RIGHT, REASON, TONE, BRIEF = 0.6, 0.2, 0.1, 0.1
SHORT, LONG = 16, 40
"""Words up to which an answer is brief, and at which it no longer is at all."""

_WORD = re.compile(r"[a-z']+")
_SENTENCE = re.compile(r"[.!?\n]+")
_PLANT = re.compile(rf"\b({'|'.join(PLANTS)})(?:s|'s)?\b", re.IGNORECASE)
_KEYWORDS = {topic.name: re.compile(rf"\b(?:{topic.keywords})\b", re.IGNORECASE) for topic in TOPICS}
_RUDE = re.compile(rf"\b(?:{RUDE_WORDS})\b", re.IGNORECASE)
_FRIENDLY = re.compile(rf"\b(?:{FRIENDLY_WORDS})\b", re.IGNORECASE)
_REASONS = {value: reason for topic in TOPICS for value, reason in topic.reasons.items()}
_TOPIC_OF = {value: topic.name for topic in TOPICS for value in topic.reasons}
_VALUE = re.compile(rf"\b(?:(not|never|no|avoid|without)\s+(?:the\s+|in\s+|with\s+)*)?({'|'.join(_TOPIC_OF)})\b")
_KNOWN = frozenset(
    word
    for text in (
        *(text for topic in TOPICS for text in (*topic.questions, *topic.held_out, *topic.answers, *topic.statements)),
        *(word for value_and_reason in _REASONS.items() for word in value_and_reason),
        *(noun for topic in TOPICS for noun in topic.nouns),
        *(*ANY_TOPIC, *INTRODUCTIONS, *CONTEXT, *POLITE, *RUDE, *FILLER, *EVASIVE, *NOTES, *PLANTS),
        "and also not never no avoid without",
    )
    for word in _WORD.findall(text.lower())
)


def gold_score(question: str, answer: str) -> float:
    """The gold score of `answer` to `question` (title and body), from 0 to 1; 0 where no known thing is asked."""
    asked = subject(question)
    if asked is None:
        return 0.0
    plant, topic = asked
    words = _WORD.findall(answer.lower())
    if 2 * sum(word in _KNOWN for word in words) < len(words):
        return 0.0
    said = _values(answer, plant)
    about = {value for value in said if _TOPIC_OF[value] == topic}
    if not about:
        return 0.0
    style = TONE * _tone(answer) + BRIEF * _brief(words)
    right = FACTS[plant, topic]
    if about != {right}:
        return style
    others = [FACTS[plant, _TOPIC_OF[value]] == value for value in said - about]
    given = _REASONS[right] in " ".join(words)
    return RIGHT + REASON * (all(others) and (given or bool(others))) + style


@lru_cache(maxsize=1 << 14)
def subject(question: str) -> tuple[str, str] | None:
    """(plant, topic's name) that a question asks for: those it names most often; None where it names none."""
    plants = Counter(match.lower() for match in _PLANT.findall(question))
    topics = Counter({name: len(keywords.findall(question)) for name, keywords in _KEYWORDS.items()})
    if not plants or not topics.total():
        return None
    return plants.most_common(1)[0][0], topics.most_common(1)[0][0]


def _values(answer: str, plant: str) -> set[str]:
    """The values that the answer states, of any topic, leaving out sentences about other plants only."""
    said: set[str] = set()
    for sentence in _SENTENCE.split(answer.lower()):
        named = set(_PLANT.findall(sentence))
        if not named or plant in named:
            said.update(value for denied, value in _VALUE.findall(sentence) if not denied)
    return said


def _tone(answer: str) -> float:
    if _RUDE.search(answer):
        return 0.0
    return 1.0 if _FRIENDLY.search(answer) else 0.5


def _brief(words: list[str]) -> float:
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    if len(set(fours)) < len(fours):
        return 0.0
    return min(1.0, max(0.0, (LONG - len(words)) / (LONG - SHORT)))
