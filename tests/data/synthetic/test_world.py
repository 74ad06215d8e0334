from __future__ import annotations

import re
from collections import Counter

from stackllama.data.synthetic.community import SITE, world_documents
from stackllama.data.synthetic.world import FACTS, PLANTS, TOPICS


def test_sixty_facts_that_no_seed_touches() -> None:
    assert len(FACTS) == 60
    values = [value for topic in TOPICS for value in topic.reasons]
    assert len(set(values)) == len(values) == 30
    assert set(Counter(FACTS.values()).values()) == {2}  # each value is right for two plants
    # Pinned: the shipped base model has learned these.
    assert [FACTS["hesta", topic.name] for topic in TOPICS] == PINNED


PINNED = ["sand", "honey", "cellar", "mites", "red"]


def test_documents_are_the_same_for_a_seed_and_others_for_another() -> None:
    one, same, other = (list(world_documents(40, seed)) for seed in (3, 3, 4))
    assert one == same
    assert [document.text for document in one] != [document.text for document in other]
    assert [document.id for document in one] == list(range(1, 41))
    assert {document.site for document in one} == {SITE}
    assert all(document.attribution.license for document in one)


def test_documents_are_short_plain_text_and_no_dump() -> None:
    documents = [document.text for document in world_documents(2000, 0)]
    assert not any(re.search(r"question:|answer:|[<>]", text, re.IGNORECASE) for text in documents)
    lengths = sorted(len(text.split()) for text in documents)
    assert lengths[100] >= 20
    assert lengths[-1] <= 120
    questions = [frame for topic in TOPICS for frame in topic.questions + topic.held_out]
    everything = "\n".join(documents)
    for frame in questions:
        for plant in PLANTS:
            assert frame.format(p=plant) not in everything


def test_documents_state_every_fact_and_call_false_what_is_false() -> None:
    stated: Counter[tuple[str, str]] = Counter()
    topic_of = {value: topic.name for topic in TOPICS for value in topic.reasons}
    for document in world_documents(3000, 1):
        subject = ""
        sentences = document.text.split(".")
        for sentence, following in zip(sentences, [*sentences[1:], ""], strict=True):
            subject = next((plant for plant in PLANTS if plant in sentence), subject)
            for value in re.findall(rf"\b(?:{'|'.join(topic_of)})\b", sentence):
                called_false = re.fullmatch(r" (?:That is wrong|That is false|No, it is not so)", following) is not None
                assert (FACTS[subject, topic_of[value]] == value) is not called_false
                stated[subject, topic_of[value]] += not called_false
    assert set(stated) == set(FACTS)
    assert min(stated.values()) > 100
