"""Questions to language models, and their answers read strictly: what cannot be read is no answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise


@dataclass(frozen=True)
class Prompt:
    """A question about documents: a system message, and a text in which they stand between `pieces`.

    There is one piece more than there are documents. Only documents may be cut to make a prompt fit.
    """

    system: str
    pieces: tuple[str, ...]
    documents: tuple[str, ...]

    def text(self, documents: Sequence[str] | None = None) -> str:
        """The text with its documents, or with others in their places."""
        inside = self.documents if documents is None else documents
        return self.pieces[0] + "".join(
            document + piece for document, piece in zip(inside, self.pieces[1:], strict=True)
        )


def fill_template(
    template: str, values: Mapping[str, str], documents: Mapping[str, Sequence[str]], system: str = ""
) -> Prompt:
    """A prompt from a template with places `{name}` for values and documents.

    Several documents in one place are numbered from 1, `[1] ...`, one a line. Other braces stay as they are.
    """
    pieces, inside = [""], []
    for number, part in enumerate(re.split(rf"\{{({'|'.join([*values, *documents])})\}}", template)):
        if number % 2 == 0:
            pieces[-1] += part
        elif part in values:
            pieces[-1] += values[part]
        else:
            for place, document in enumerate(documents[part], start=1):
                if len(documents[part]) > 1:
                    pieces[-1] += ("\n" if place > 1 else "") + f"[{place}] "
                inside.append(document)
                pieces.append("")
    return Prompt(system, tuple(pieces), tuple(inside))


def check_template(template: str, places: Iterable[str]) -> None:
    """ValueError for a template that lacks one of the places."""
    for place in places:
        if f"{{{place}}}" not in template:
            raise ValueError(f"the prompt has no place {{{place}}}: {template[:60]!r}")


def cut_words(text: str, count: int | None) -> str:
    """The first `count` words of a text, blanks between them as they are; None: the whole text."""
    if count is None:
        return text
    words = list(islice(re.finditer(r"\S+", text), count + 1))
    return text if len(words) <= count else text[: words[count - 1].end()]


def read_ranking(answer: str, count: int) -> list[int] | None:
    """The order that an answer such as `[2] > [1] > [3]` gives to `count` documents; places from 0.

    Of an answer with other text, the longest such chain counts. Repeated identifiers and those that name no
    document are dropped; documents that are not named follow in the order in which they came in. None
    for an answer that names none.
    Source: Sun et al. 2023 (RankGPT), arXiv:2304.09542.
    """
    chains = re.findall(r"\[\d+\](?:\s*>\s*\[\d+\])*", answer)
    named = re.findall(r"\d+", max(chains, key=lambda chain: chain.count("["), default=""))
    order = dict.fromkeys(place for name in named if 0 <= (place := int(name) - 1) < count)
    if not order:
        return None
    return [*order, *(place for place in range(count) if place not in order)]


def read_grade(answer: str, highest: int) -> int | None:
    """The grade, 0 to `highest`, if that is the only number in the answer."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    grades = {str(grade): grade for grade in range(highest + 1)}
    return grades.get(numbers[0]) if len(numbers) == 1 else None


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer is, alone or after one word: "B", "Passage B."; None for anything else."""
    either = "|".join(re.escape(choice) for choice in choices)
    found = re.fullmatch(rf"\W*(?:\w+\W+)?({either})\W*", answer)
    return list(choices).index(found[1]) if found else None


def windows(count: int, size: int, step: int) -> list[tuple[int, int]]:
    """The windows (start, end) that pass over a list from its end to its beginning; the last begins at 0.

    Each is `size` long, less at the beginning of the list. RankGPT's own loop ends before the
    beginning of a list that the steps do not divide; here it is always ranked.
    """
    ends = [count]
    while ends[-1] > size:
        ends.append(ends[-1] - step)
    return [(max(0, end - size), end) for end in ends] if count > 1 else []


def shorten(lengths: Sequence[int], budget: int) -> int:
    """The greatest length to which all may be cut so that together they stay within `budget`."""
    before = 0
    ordered = sorted(lengths)
    for place, (low, high) in enumerate(pairwise([0, *ordered])):
        left = len(ordered) - place
        if before + high * left > budget:
            return low + (budget - before - low * left) // left
        before += high
    return max(ordered, default=0)
