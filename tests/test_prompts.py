"""Prompts are filled as they say, and answers that cannot be read are none."""

from __future__ import annotations

import itertools

import pytest

from retrieval_kd.prompts import (
    check_template,
    cut_words,
    fill_template,
    read_choice,
    read_grade,
    read_ranking,
    shorten,
    windows,
)


def test_a_template_is_filled_once() -> None:
    """A text that looks like a place is a text."""
    prompt = fill_template('{"q": "{query}"} {document}!', {"query": "{document}?"}, {"document": ["a {query}"]}, "sys")
    assert prompt.text() == '{"q": "{document}?"} a {query}!'
    assert prompt.pieces == ('{"q": "{document}?"} ', "!")
    assert prompt.text(["b"]) == '{"q": "{document}?"} b!'
    assert prompt.system == "sys"


def test_several_documents_are_numbered() -> None:
    prompt = fill_template("{query}: {documents} {query}", {"query": "q"}, {"documents": ["one", "two"]})
    assert prompt.text() == "q: [1] one\n[2] two q"
    assert prompt.documents == ("one", "two")
    assert prompt.text(["", ""]) == "q: [1] \n[2]  q"


def test_a_place_that_is_missing() -> None:
    check_template("{query}{document}", ["query", "document"])
    with pytest.raises(ValueError, match=r"no place \{document\}: 'just \{query\}'"):
        check_template("just {query}", ["query", "document"])


def test_words_are_cut_and_blanks_are_kept() -> None:
    assert cut_words(" a\n b  c ", 2) == " a\n b"
    assert cut_words(" a\n b  c ", 3) == " a\n b  c "
    assert cut_words(" a b ", None) == " a b "
    assert cut_words("", 1) == ""


@pytest.mark.parametrize(
    ("answer", "order"),
    [
        ("[3] > [1] > [2] > [4]", [2, 0, 1, 3]),
        ("[3]>[1]", [2, 0, 1, 3]),  # the others follow as they came
        ("[2] > [2] > [4] > [2]", [1, 3, 0, 2]),
        ("[9] > [0] > [4]", [3, 0, 1, 2]),  # no such documents
        ("Of [1] and [2], I say: [4] > [3]", [3, 2, 0, 1]),
        ("[1]", [0, 1, 2, 3]),
        ("[4] > [3]\n[1] > [2] > [3]", [0, 1, 2, 3]),
        ("4 > 3 > 2 > 1", None),
        ("[9]", None),
        ("I cannot rank these passages.", None),
        ("", None),
        ("[a] > [b]", None),
    ],
)
def test_rankings(answer: str, order: list[int] | None) -> None:
    assert read_ranking(answer, 4) == order


@pytest.mark.parametrize(
    ("answer", "grade"),
    [("2", 2), ("Grade: 3.", 3), ("0", 0), ("4", None), ("-1", None), ("2.5", None), ("2 of 3", None), ("two", None)],
)
def test_grades(answer: str, grade: int | None) -> None:
    assert read_grade(answer, 3) == grade


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("A", 0),
        ("B.", 1),
        ("Passage B", 1),
        ('"Passage A"', 0),
        ("**B**", 1),
        ("A or B", None),
        ("I think that A", None),
        ("a", None),
        ("Neither", None),
        ("", None),
        ("Bad", None),
    ],
)
def test_choices(answer: str, choice: int | None) -> None:
    assert read_choice(answer, ("A", "B")) == choice


def test_windows_reach_the_beginning() -> None:
    assert windows(100, 20, 10) == [(80, 100), *((start, start + 20) for start in range(70, -1, -10))]
    assert windows(25, 20, 10) == [(5, 25), (0, 15)]
    assert windows(20, 20, 10) == [(0, 20)]
    assert windows(3, 20, 10) == [(0, 3)]
    assert windows(1, 20, 10) == windows(0, 20, 10) == []
    for count, size, step in itertools.product(range(2, 60), (2, 5, 20), (1, 3, 4)):
        if step < size:
            assert windows(count, size, step)[-1][0] == 0
            assert {place for start, end in windows(count, size, step) for place in range(start, end)} == set(
                range(count)
            )


def test_what_is_too_long_is_cut_to_one_length() -> None:
    for lengths in itertools.product(range(5), repeat=3):
        for budget in range(14):
            fits = [cut for cut in range(5) if sum(min(length, cut) for length in lengths) <= budget]
            assert min(max(fits), max(lengths)) == shorten(lengths, budget), (lengths, budget)
