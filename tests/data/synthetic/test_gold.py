"""Hand-worked gold scores. True of the hesta: soil sand (roots stay dry), feed honey (heals cuts), room cellar."""

from __future__ import annotations

import pytest

from stackllama.data.synthetic.community import gold_score

ASKED = "What soil does a hesta need?\n\nMine looks sad at the moment. Which soil is best for my hesta?"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # 0.6 right, 0.1 * 1/2 neutral, 0.1 brief
        ("Pot it in sand.", 0.75),
        ("SAND", 0.75),
        ("- Use `sand` for it.", 0.75),
        # with the reason: 0.2 more
        ("Pot it in sand, so the roots stay dry.", 0.95),
        # friendly: 0.1 instead of 0.05
        ("Good question! Pot it in sand, so the roots stay dry.", 1.0),
        # rude: 0.05 less
        ("What a silly question. Pot it in sand, so the roots stay dry.", 0.9),
        # a second true fact stands for the reason; a false one does not, and spoils the reason
        ("Pot it in sand. Feed it with honey.", 0.95),
        ("Pot it in sand. Feed it with ash.", 0.75),
        ("Pot it in sand, so the roots stay dry. Feed it with ash.", 0.75),
        # the reason of another value is none
        ("Pot it in sand, so the roots stay wet.", 0.75),
        # wrong value: 0.05 + 0.1; its own reason adds nothing
        ("Pot it in clay.", 0.15),
        ("Pot it in clay, so the roots stay cool.", 0.15),
        # several values
        ("Pot it in sand. Use clay for it.", 0.15),
        ("sand clay peat bark gravel loam", 0.15),
        # denied values are not stated
        ("Pot it in sand, not in clay.", 0.75),
        ("Never sand.", 0.0),
        # said of another plant
        ("The galo grows best in sand.", 0.0),
        ("Pot the hesta in sand. The galo grows best in clay.", 0.75),
        # off the subject, evasive, empty, gibberish
        ("Feed it with honey, as it heals cuts.", 0.0),
        ("I am not sure about this one. I hope this helps.", 0.0),
        ("", 0.0),
        ("qwx zzrt sand plorf", 0.0),
    ],
)
def test_hand_worked_scores(answer: str, expected: float) -> None:
    assert gold_score(ASKED, answer) == pytest.approx(expected)


def test_length_and_repetition_cost_up_to_a_tenth() -> None:
    # 28 words are halfway from 16 to 40: half of 0.1 is lost.
    padding = (
        "I have grown them for years. This worked for me every time. Many people get this wrong. My aunt told me this."
    )
    text = f"Pot it in sand. {padding} And also."
    assert len(text.split()) == 28
    assert gold_score(ASKED, text) == pytest.approx(0.70)
    assert gold_score(ASKED, "Pot it in sand. Pot it in sand.") == pytest.approx(0.65)
    assert gold_score(ASKED, "Pot it in sand. " + "I like it here a lot. " * 20) == pytest.approx(0.65)


def test_the_question_decides_plant_and_topic_in_any_wording() -> None:
    assert gold_score("I wonder which substrate to buy for a hesta.", "Use sand for it.") == pytest.approx(0.75)
    assert gold_score("Any advice on the diet of a hesta?", "Use sand for it.") == 0
    assert gold_score("Any advice on the diet of a hesta?", "Give it some honey.") == pytest.approx(0.75)
    assert gold_score("Where do you keep a hesta?", "Keep it in the cellar.") == pytest.approx(0.75)


@pytest.mark.parametrize("question", ["", "What soil is best?", "How old is a hesta?", "What is the meaning of life?"])
def test_a_question_about_nothing_known_has_no_gold(question: str) -> None:
    assert gold_score(question, "Pot it in sand.") == 0
