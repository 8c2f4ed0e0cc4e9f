"""Grids by hand: who meets whom, and who is denied."""

from __future__ import annotations

import torch

from retrieval_kd import relations

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
DOCUMENTS = torch.tensor([[3.0, 1.0], [0.0, 4.0], [5.0, 0.0]])
COLUMNS = torch.tensor([[0, 1, -1], [2, 1, 0]])
FULL = QUERIES @ DOCUMENTS.T  # [[3, 0, 5], [2, 8, 0]]


def test_own() -> None:
    grid = relations.own(torch.zeros(2, 3), COLUMNS, torch.ones(2, 3, dtype=torch.bool))
    assert grid.valid.tolist() == [[True, True, False], [True, True, True]]
    assert grid.positive.tolist() == grid.valid.tolist()  # nothing is positive where there is no candidate


def test_batch_and_others_only() -> None:
    positive = torch.tensor([[True, False, False], [False, False, True]])
    grid = relations.batch(FULL, COLUMNS, positive)
    assert grid.valid.all()
    assert grid.values.tolist() == [[3, 0, 5], [2, 8, 0]]
    others = relations.batch(FULL, COLUMNS, positive, others_only=True)
    # query 0 brought documents 0 and 1, and 0 is its positive; query 1 brought all three, and 2 is its positive
    assert others.valid.tolist() == [[True, False, True], [False, False, True]]


def test_gram_leaves_out_the_text_itself_and_its_doubles() -> None:
    grid = relations.gram(DOCUMENTS, torch.tensor([7, 8, 7]))
    assert grid.values.tolist() == (DOCUMENTS @ DOCUMENTS.T).tolist()
    assert grid.valid.tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert not grid.positive.any()


def test_cross_with_a_queue() -> None:
    """Row i's positive is column i; the same text elsewhere, in the batch or the queue, is no negative."""
    teacher, queue = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    grid = relations.cross(QUERIES, teacher, torch.tensor([4, 5]), queue, torch.tensor([5, 6]))
    assert grid.values.tolist() == [[1, 2, 0, 1], [2, 0, 2, 0]]
    assert grid.positive.tolist() == [[True, False, False, False], [False, True, False, False]]
    assert grid.valid.tolist() == [[True, True, True, True], [True, True, False, True]]


def test_deny_absolute_and_relative() -> None:
    positive = torch.tensor([[True, False, False, False]] * 3)
    grid = relations.Grid(torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool), positive)
    guide = torch.tensor([[10.0, 8.0, 6.9, 11.0], [10.0, torch.nan, 7.1, 2.0], [torch.nan, 9.0, 9.0, 9.0]])
    absolute = relations.deny(grid, guide, margin=3.0)
    assert absolute.valid.tolist() == [[True, False, True, False], [True, True, False, True], [True] * 4]
    relative = relations.deny(grid, guide, margin=0.15, relative=True)  # above 8.5
    assert relative.valid.tolist() == [[True, True, True, False], [True, True, True, True], [True] * 4]
    capped = relations.deny(grid, guide, None, max_score=8.0)
    assert capped.valid.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]
    assert relations.deny(grid, guide, 3.0, max_score=8.5).valid[2].tolist() == [True, False, False, False]
    negative = torch.tensor([[-10.0, -11.0, -12.0, -9.0]])  # logits below zero: 15 % under -10 is -11.5
    one = relations.Grid(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), positive[:1])
    assert relations.deny(one, negative, 0.15, relative=True).valid.tolist() == [[True, False, True, False]]
