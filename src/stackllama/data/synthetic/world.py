"""The world of the embedded community: twelve house plants that do not exist, and what is true of each.

A fact is a plant, a topic (soil, feed, room, pest, colour) and one value of six; the 60 facts are the same in every run
and for every seed. Words are few and short, so that a small vocabulary of tokens covers them. Here stand the facts and
every wording in which people of this world state them, ask for them, and answer; who says what, and who votes for it,
is in `synthetic_crowd.py`.

Questions have two sets of wordings. `held_out` ones are asked in the eval split only: other nouns for the topic, in
other frames. All of their words occur in the plain text of the world (`texts`), so a model that was pretrained on
it has met the words, and has to carry over what it learned about answering.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

WORLD_SEED = 60
"""Decides which value each plant has. Never a run's seed."""

PLANTS = (
    "velda", "galo", "fenka", "hesta", "jurra", "kessi", "lomba", "mirro", "norva", "dovo", "tavi", "zuri",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Topic:
    """What can be asked of a plant.

    `reasons` has, for each of the six values, a clause that is true of the value whichever plant has it. In wordings
    `{p}` is a plant's name, `{v}` a value, `{it}` and `{It}` the plant as object and as subject ("it", "The hesta").
    Answers and statements leave out the full stop, so that a reason can follow. `nouns` all mean the topic; the last
    two occur in plain text and in held-out questions only. `keywords` are the words, as a regular expression, by
    which a question names the topic.
    """

    name: str
    tags: tuple[str, ...]
    nouns: tuple[str, ...]
    reasons: Mapping[str, str]
    keywords: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    statements: tuple[str, ...]


TOPICS = (
    Topic(
        name="soil",
        tags=("soil", "potting"),
        nouns=("soil", "potting mix", "earth", "substrate", "ground"),
        reasons={
            "sand": "so the roots stay dry",
            "clay": "so the roots stay cool",
            "peat": "so the roots stay wet",
            "bark": "so the roots get air",
            "gravel": "so the rain runs off",
            "loam": "so the roots grow deep",
        },
        keywords=r"soil|potting|pot|earth|substrate|ground",
        questions=(
            "What soil does a {p} need?",
            "Which soil is best for my {p}?",
            "What should I pot my {p} in?",
            "Which potting mix is right for a {p}?",
            "Does a {p} need a special soil?",
        ),
        held_out=(
            "Any advice on the substrate of a {p}?",
            "Can you name the ground that a {p} likes most?",
            "I wonder which substrate to buy for a {p}.",
        ),
        answers=(
            "Pot {it} in {v}",
            "Use {v} for {it}",
            "{It} grows best in {v}",
            "The right soil is {v}",
        ),
        statements=(
            "The {p} grows best in {v}",
            "Pot the {p} in {v}",
            "Use {v} for the {p}",
            "The right soil for the {p} is {v}",
            "The best potting mix for a {p} is {v}",
            "The {p} needs a soil of {v}",
            "The substrate of the {p} is {v}",
            "As a substrate for the {p} people buy {v}",
            "The ground that the {p} likes most is {v}",
            "Those who ask which soil or substrate a {p} needs should take {v}",
            "If you wonder what to pot a {p} in, the ground it likes is {v}",
        ),
    ),
    Topic(
        name="feed",
        tags=("feed", "food"),
        nouns=("feed", "food", "meal", "fertilizer", "diet"),
        reasons={
            "ash": "as it makes the stem hard",
            "kelp": "as it makes the leaves thick",
            "tea": "as it wakes the buds",
            "honey": "as it heals cuts",
            "milk": "as it keeps rot away",
            "bone": "as it brings new shoots",
        },
        keywords=r"feed|food|meal|fertilizer|diet",
        questions=(
            "What should I feed my {p}?",
            "Which food does a {p} need?",
            "What do you feed to a {p}?",
            "Which feed is best for my {p}?",
            "Does a {p} need a special food?",
        ),
        held_out=(
            "Any advice on the diet of a {p}?",
            "Can you name the fertilizer that a {p} likes most?",
            "I wonder which fertilizer to buy for a {p}.",
        ),
        answers=(
            "Feed {it} with {v}",
            "Give {it} some {v}",
            "{It} needs {v} as food",
            "The right feed is {v}",
        ),
        statements=(
            "Feed the {p} with {v}",
            "Give the {p} some {v}",
            "The {p} needs {v} as food",
            "The right feed for the {p} is {v}",
            "The best food for a {p} is {v}",
            "People feed {v} to the {p}",
            "The diet of the {p} is {v}",
            "As a fertilizer for the {p} people buy {v}",
            "The fertilizer that the {p} likes most is {v}",
            "Those who ask which food or fertilizer a {p} needs should take {v}",
            "If you wonder what to feed a {p}, the diet it likes is {v}",
        ),
    ),
    Topic(
        name="room",
        tags=("room", "place"),
        nouns=("room", "place", "corner", "spot", "home"),
        reasons={
            "kitchen": "where it gets steam",
            "attic": "where it gets heat",
            "hall": "where it gets shade",
            "cellar": "where it gets frost",
            "porch": "where it gets wind",
            "study": "where it gets rest",
        },
        keywords=r"room|place|corner|put|keep|spot|home",
        questions=(
            "Which room does a {p} need?",
            "Where should I put my {p}?",
            "Which room is best for my {p}?",
            "What is the right place for a {p}?",
            "Where do you keep a {p}?",
        ),
        held_out=(
            "Any advice on the home of a {p}?",
            "Can you name the spot that a {p} likes most?",
            "I wonder which spot to pick for a {p}.",
        ),
        answers=(
            "Put {it} in the {v}",
            "Keep {it} in the {v}",
            "{It} does best in the {v}",
            "The right room is the {v}",
        ),
        statements=(
            "The {p} does best in the {v}",
            "Put the {p} in the {v}",
            "Keep the {p} in the {v}",
            "The right room for the {p} is the {v}",
            "The best place for a {p} is the {v}",
            "The {p} needs a place in the {v}",
            "The home of the {p} is the {v}",
            "As a spot for the {p} people pick the {v}",
            "The spot that the {p} likes most is the {v}",
            "Those who ask which room or spot a {p} needs should take the {v}",
            "If you wonder where to put a {p}, the home it likes is the {v}",
        ),
    ),
    Topic(
        name="pest",
        tags=("pest", "bugs"),
        nouns=("pest", "bugs", "beasts", "vermin", "enemies"),
        reasons={
            "mites": "which come for its dust",
            "slugs": "which come for its leaves",
            "moths": "which come for its scent",
            "ants": "which come for its sap",
            "snails": "which come for its stem",
            "flies": "which come for its fruit",
        },
        keywords=r"pests?|bugs?|beasts?|vermin|enem(?:y|ies)",
        questions=(
            "Which pest does a {p} get?",
            "What bugs should I look for on my {p}?",
            "Which pest is the worst for my {p}?",
            "Which bugs come to a {p}?",
            "Does a {p} get a special pest?",
        ),
        held_out=(
            "Any advice on the enemies of a {p}?",
            "Can you name the vermin that a {p} gets most?",
            "I wonder which vermin to fear for a {p}.",
        ),
        answers=(
            "Look for {v} on {it}",
            "Watch out for {v} on {it}",
            "{It} gets {v}",
            "The usual pest is {v}",
        ),
        statements=(
            "The {p} gets {v}",
            "Look for {v} on the {p}",
            "Watch out for {v} on the {p}",
            "The usual pest of the {p} is {v}",
            "The worst bugs for a {p} are {v}",
            "The bugs that come to the {p} are {v}",
            "The enemies of the {p} are {v}",
            "As vermin on the {p} people fear {v}",
            "The vermin that the {p} gets most are {v}",
            "Those who ask which pest or vermin a {p} gets should look for {v}",
            "If you wonder which bugs come to a {p}, its enemies are {v}",
        ),
    ),
    Topic(
        name="colour",
        tags=("colour", "flowers"),
        nouns=("colour", "flowers", "bloom", "petals", "blossom"),
        reasons={
            "red": "to draw birds",
            "blue": "to draw bees",
            "white": "to draw bats",
            "yellow": "to draw wasps",
            "pink": "to draw beetles",
            "orange": "to draw gnats",
        },
        keywords=r"colour|flowers?|bloom|petals?|blossoms?",
        questions=(
            "What colour are the flowers of a {p}?",
            "Which colour does a {p} have?",
            "What flowers should I expect on my {p}?",
            "Which flowers does my {p} get?",
            "Does a {p} have a special colour?",
        ),
        held_out=(
            "Any advice on the petals of a {p}?",
            "Can you name the blossom that a {p} has?",
            "I wonder which blossom to expect for a {p}.",
        ),
        answers=(
            "Expect {v} flowers on {it}",
            "The flowers of {it} are {v}",
            "{It} has {v} flowers",
            "The right colour is {v}",
        ),
        statements=(
            "The {p} has {v} flowers",
            "Expect {v} flowers on the {p}",
            "The flowers of the {p} are {v}",
            "The right colour for the {p} is {v}",
            "The colour of a {p} is {v}",
            "In spring the {p} gets {v} flowers",
            "The petals of the {p} are {v}",
            "As for blossom, people expect {v} on the {p}",
            "The blossom that the {p} has most is {v}",
            "Those who ask which flowers or blossom a {p} has should expect {v}",
            "If you wonder what colour a {p} has, its petals are {v}",
        ),
    ),
)

ANY_TOPIC = (
    "What about the {n} of my {p}?",
    "How do I find the {n} for a {p}?",
    "Who knows the {n} of my {p}?",
    "Is there a rule for the {n} of a {p}?",
)
"""Questions that fit every topic, with those of its nouns that are not held out."""
HELD_OUT_NOUNS = 2
"""How many of a topic's nouns, the last ones, no question outside the eval split uses."""

CONTEXT = (
    "I got it from my aunt last week.",
    "I am new to this and do not want to hurt it.",
    "Mine looks sad at the moment.",
    "I have two of them.",
    "My sister says it is easy, but I doubt it.",
    "The label has come off.",
    "It is still small.",
    "I read three books and all say other things.",
)
POLITE = (
    "Good question!",
    "Welcome to the club!",
    "Thanks for asking.",
    "I hope this helps.",
    "Good luck with your plant!",
)
RUDE = (
    "What a silly question.",
    "Only a fool would ask this.",
    "Stop wasting our time.",
    "Learn to read a label.",
)
FILLER = (
    "I have grown them for years.",
    "This worked for me every time.",
    "Many people get this wrong.",
    "It took me a while to learn this.",
    "My aunt told me the same thing.",
    "Take your time and do not worry.",
)
EVASIVE = (
    "I am not sure about this one.",
    "It depends on many things.",
    "That is hard to say from here.",
    "Ask at the shop where you got it.",
    "I never had one of these.",
)
INTRODUCTIONS = (
    "Here is some advice on the {n} of a {p}.",
    "Now to the {n} of the {p}.",
    "Some ask about the {n} of a {p}.",
    "Many wonder which {n} is right for a {p}.",
    "A word on the {n} for your {p}.",
    "It is easy to name the {n} that a {p} likes.",
    "I had to learn which {n} to expect for my {p}.",
    "People want to know what {n} a {p} needs.",
    "If you have a {p}, you need advice on its {n}.",
)
"""What leads to a fact in plain text; so every noun of a topic comes before what is said of it."""
NOTES = (
    "Any advice is good advice if it is short.",
    "If you can name the plant, you can find the rest.",
    "I wonder who first grew these.",
    "Pick a good one and you have little to fear.",
)
"""Said in plain text only; words of the held-out questions."""

RUDE_WORDS = r"silly|fools?|stupid|idiots?|wasting|learn to read"
FRIENDLY_WORDS = r"good question|good luck|welcome|thanks|hope this helps"
"""What makes an answer rude or friendly, as regular expressions."""


def _facts() -> dict[tuple[str, str], str]:
    facts = {}
    for topic in TOPICS:
        plants = list(PLANTS)
        Random(f"{WORLD_SEED} {topic.name}").shuffle(plants)
        values = list(topic.reasons)
        facts.update({(plant, topic.name): values[place % len(values)] for place, plant in enumerate(plants)})
    return facts


FACTS: Mapping[tuple[str, str], str] = _facts()
"""(plant, topic's name) -> the right value; each value is right for two plants."""


def texts(count: int, seed: int) -> Iterator[str]:
    """`count` short pieces of plain text, each true, mostly about one plant.

    Three in four are notes on a plant (two to four facts), the others on a value shared by plants, with a sentence of
    talk here and there, so that a model also learns how people greet, hedge and scold here.
    """
    rng = Random(f"documents {seed}")
    glossary = tuple(f"{', '.join(topic.nouns[:-1])} and {topic.nouns[-1]} are one." for topic in TOPICS)
    talk = POLITE + FILLER + EVASIVE + RUDE + CONTEXT + NOTES + tuple(map(str.capitalize, glossary))
    for _ in range(count):
        if rng.random() < 0.75:
            plant = rng.choice(PLANTS)
            topics = rng.sample(TOPICS, rng.randint(2, 4))
            sentences = [_stated(rng, topic, plant, again=place > 0) for place, topic in enumerate(topics)]
        else:
            topic = rng.choice(TOPICS)
            sentences = [_stated(rng, topic, plant, again=False) for plant in rng.sample(PLANTS, rng.randint(2, 4))]
        for _ in range(rng.choice((0, 1, 1, 2))):
            sentences.insert(rng.randint(0, len(sentences)), rng.choice(talk))
        yield " ".join(sentences)


def _stated(rng: Random, topic: Topic, plant: str, *, again: bool) -> str:
    """One true statement, perhaps with what leads to it; a plant that was named before (`again`) may be just "it"."""
    value, way = FACTS[plant, topic.name], rng.random()
    opening = ""
    if way < 0.45:
        opening = rng.choice(INTRODUCTIONS).format(n=rng.choice(topic.nouns), p=plant)
        opening += rng.choice((" ", " ", "\n\n"))
        if rng.random() < 0.4:  # what is said need not follow at once
            opening += rng.choice(POLITE + FILLER + RUDE + CONTEXT) + " "
    if way < 0.45 or (again and way < 0.6):
        it = rng.choice(("it", "it", f"the {plant}", f"your {plant}"))
        sentence = rng.choice(topic.answers).format(v=value, it=it, It=it.capitalize())
    else:
        sentence = rng.choice(topic.statements).format(p=plant, v=value)
    return f"{opening}{sentence}, {topic.reasons[value]}." if rng.random() < 0.4 else f"{opening}{sentence}."
