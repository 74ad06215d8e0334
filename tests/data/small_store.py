"""A store of three questions whose numbers are worked by hand."""

from __future__ import annotations

from pathlib import Path

from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.data.store import store


def by(url: str, licence: str = "CC BY-SA 2.5") -> Attribution:
    return Attribution(url, "Ada", 1, "https://a.test/users/1", licence)


def answer(number: int, votes: int, day: str, length: int | None, text: str = "text", accepted: bool = False) -> Answer:
    return Answer(number, text, votes, accepted, f"{day}T00:00:00.000", by(f"https://a.test/a/{number}"), length)


# Its pairs: an answer of 8 characters is better than one of 10, and so is one of 17; both are the earlier ones.
FIRST = Question(
    site="a.test",
    id=1,
    title="First",
    text="See [here](http://a.b/c) and `code`.",  # 22 characters without the address
    tags=("x", "y"),
    votes=5,
    date="2010-03-01T00:00:00.000",
    attribution=by("https://a.test/q/1"),
    answers=(
        answer(11, 3, "2010-03-02", 8, "```\n$no_formula$\n```", accepted=True),
        answer(12, -2, "2010-03-03", 10, "costs $5 or $6"),
        answer(13, 0, "2010-03-02", None, "$a_b$ in 17 signs"),
    ),
    pairs=(Pair(0, 1, 3, 1.5), Pair(2, 1, 1)),
    weight=2.0,
    cluster="a.test/1",
)
# The longer and later answer is better.
SECOND = Question(
    site="a.test",
    id=20,
    title="",
    text="$$x$$ ![shown](http://i.test/i.png)",
    tags=("x",),
    votes=-1,
    date="2011-05-01T00:00:00.000",
    attribution=by("https://a.test/q/20", "CC BY-SA 3.0"),
    answers=(answer(21, 1, "2011-05-03", 30), answer(22, 0, "2011-05-02", 10, "http://bare.test")),
    pairs=(Pair(0, 1, 1),),
    cluster="a.test/20",
)
LONELY = Question("b.test", 1, "Lonely", "?", (), 0, "", by(""), (), cluster="b.test/1")


def write(folder: Path) -> Path:
    store.write_questions(folder, "sft", [FIRST, LONELY])
    store.write_questions(folder, "eval", [SECOND])
    return folder
