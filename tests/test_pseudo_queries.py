"""Pseudo-queries, by hand and against a plain reading of their definition."""

from __future__ import annotations

import pytest

from retrieval_kd.pseudo_queries import make_pseudo_queries
from retrieval_kd.recipe import PseudoQueries

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()  # noqa: SIM905


def sentence(number: int) -> str:
    return f"Sentence number {number} of many."


def test_sentences_by_hand() -> None:
    documents = [
        'Sort a list in place. It keeps   the\n order of ties! "Stable" is what this is called? (See the docs for it.)',
        "heading without a stop\n\nthen a paragraph of e.g. five words. not split before small letters",
        "",
        "3.5 is not two sentences here. 2 is how this one starts.",
    ]
    assert make_pseudo_queries(documents, PseudoQueries()) == [
        "Sort a list in place.",
        "It keeps the order of ties!",
        '"Stable" is what this is called?',
        "(See the docs for it.)",
        "heading without a stop",
        "then a paragraph of e.g. five words. not split before small letters",
        "3.5 is not two sentences here.",
        "2 is how this one starts.",
    ]


@pytest.mark.parametrize(("least", "most", "kept"), [(1, 8, [1, 2, 3, 8]), (2, 3, [2, 3]), (3, 3, [3]), (4, 7, [])])
def test_both_bounds_count_words_and_are_included(least: int, most: int, kept: list[int]) -> None:
    documents = [" ".join(WORDS[:count]) for count in (1, 2, 3, 8)]
    made = make_pseudo_queries(documents, PseudoQueries(minimum_words=least, maximum_words=most))
    assert [len(text.split()) for text in made] == kept


def test_each_sentence_stands_once_where_it_came_first() -> None:
    documents = ["One two three four. Five six seven eight.", "Five  six seven\neight. Nine ten eleven twelve."]
    expected = ["One two three four.", "Five six seven eight.", "Nine ten eleven twelve."]
    assert make_pseudo_queries(documents, PseudoQueries()) == expected


def test_a_share_of_each_document_in_its_order() -> None:
    documents = [" ".join(sentence(100 * doc + n) for n in range(20)) for doc in range(6)]
    documents.append(sentence(999))
    every = make_pseudo_queries(documents, PseudoQueries())
    assert len(every) == 6 * 20 + 1
    some = make_pseudo_queries(documents, PseudoQueries(per_document=3, seed=1))
    assert some == [text for text in every if text in some]  # order kept, nothing new
    counts = [sum(text in document for text in some) for document in documents]
    assert counts == [3, 3, 3, 3, 3, 3, 1]
    assert some == make_pseudo_queries(documents, PseudoQueries(per_document=3, seed=1))
    assert some != make_pseudo_queries(documents, PseudoQueries(per_document=3, seed=2))
    places = {every.index(text) % 20 for text in some}
    assert max(places) > 9  # not just the first of each


def test_only_sentences_of_fitting_length_are_drawn() -> None:
    documents = ["No. Never. Not now. This one has enough words. Neither has this."]
    options = PseudoQueries(per_document=1, minimum_words=5)
    for seed in range(5):
        chosen = make_pseudo_queries(documents, options.model_copy(update={"seed": seed}))
        assert chosen == ["This one has enough words."]


def test_whole_documents_follow_their_sentences() -> None:
    documents = ["One of the two sentences. And the other one here.", "Short."]
    made = make_pseudo_queries(documents, PseudoQueries(per_document=1, whole_documents=True))
    assert made[1:] == documents
    assert made[0] in {"One of the two sentences.", "And the other one here."}
