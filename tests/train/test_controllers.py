"""What terms remember: TAID by hand, a queue, a policy that learns; and that a checkpoint holds it all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retrieval_kd.stages import Interpolate, Select, Term
from retrieval_kd.train.controllers import ActiveTerms, Queue, Selection, Taid, TermState
from retrieval_kd.train.selection import selection_features


def test_taid_by_hand() -> None:
    taid = Taid(Interpolate(start=0.4, end=1.0, alpha=0.1, momentum=0.5))
    taid.update(2.0, 0.1)
    assert taid.tau == 0.4  # the first call only stores the loss
    taid.update(1.0, 0.0)  # the loss halved: decrease 0.5, mean 0.25
    raised = 0.4 + 0.1 / (1 + math.exp(-0.25)) * 0.6
    assert taid.tau == pytest.approx(raised)
    taid.update(1.0, 0.9)  # time alone asks for 0.4 + 0.6 * 0.9
    assert taid.tau == pytest.approx(0.94)
    for _ in range(50):
        taid.update(0.5, 1.0)
    assert taid.tau == 1.0


def test_queue_is_first_in_first_out() -> None:
    queue = Queue(3)
    vectors = torch.arange(10.0).reshape(5, 2)
    assert [part.shape for part in queue.read(vectors)] == [(0, 2), (0,)]
    queue.push(vectors[:2], torch.tensor([0, 1]))
    queue.push(vectors[2:], torch.tensor([2, 3, 4]))
    kept, texts = queue.read(vectors)
    assert (kept.tolist(), texts.tolist()) == (vectors[2:].tolist(), [2, 3, 4])
    nothing = Queue(0)
    nothing.push(vectors, torch.arange(5))
    assert nothing.read(vectors)[0].shape == (0, 2)


def test_selection_learns_whom_to_trust() -> None:
    """Teacher 0 has feature (1, 0, 0, 0), teacher 1 (0, 1, 0, 0); taking 0 pays, taking 1 costs."""
    features = np.zeros((2, 8, 4))
    features[0, :, 0] = features[1, :, 1] = 1.0
    selection, rng = Selection(Select(learning_rate=0.5)), np.random.default_rng(0)
    for _ in range(600):
        taken = selection.choose(features, rng)
        selection.feedback(float(taken[0].mean() - taken[1].mean()))
    chance = [1 / (1 + math.exp(-(weight + selection.weights[4]))) for weight in selection.weights[:2]]
    assert chance[0] > 0.9
    assert chance[1] < 0.1


def test_selection_features_by_hand() -> None:
    lists = np.array([[[3.0, 1.0, -1.0]], [[0.0, 0.0, 0.0]]], np.float32)  # sure and right; undecided
    valid, positive = np.ones((1, 3), bool), np.array([[True, False, False]])
    features = selection_features(lists, lists[0], valid, positive)
    assert features.shape == (2, 1, 4)
    entropy, rank, gap, dissent = features.transpose(2, 0, 1)[..., 0]
    assert entropy[0] < 0.9 < entropy[1] == pytest.approx(1.0)
    assert rank.tolist() == [0.0, 0.0]
    wrong = selection_features(lists, lists[0], valid, np.array([[False, False, True]]))
    assert wrong[0, 0, 1] == pytest.approx(2 / 3)  # two documents before the positive, of three
    assert gap[0] != gap[1]
    assert (dissent > 0).all()
    masked = lists.copy()
    masked[:, :, 2] = np.nan
    again = selection_features(masked, lists[0], np.array([[True, True, False]]), positive)
    assert np.isfinite(again).all()


def test_state_round_trip() -> None:
    term = Term(loss="info_nce", relation="cross", teachers=("a",), queue=5, interpolate=Interpolate(), select=Select())
    state = TermState(term)
    assert state.taid is not None
    assert state.queue is not None
    assert state.selection is not None
    state.taid.update(2.0, 0.1)
    state.taid.update(1.5, 0.2)
    state.queue.push(torch.ones(2, 3), torch.tensor([4, 5]))
    state.selection.choose(np.ones((2, 3, 4)), np.random.default_rng(0))
    state.selection.feedback(1.0)
    again = TermState(term)
    again.load_state_dict(state.state_dict())
    for name in ("taid", "queue", "selection"):
        left, right = vars(getattr(state, name)), vars(getattr(again, name))
        assert left.keys() == right.keys()
        assert all(np.array_equal(np.asarray(left[key]), np.asarray(right[key])) for key in left if key != "settings")
    assert TermState(Term(loss="kl", teachers=("a",))).state_dict() == {}


def test_active_terms_are_steered_to_the_wanted_number() -> None:
    """A penalty of weight w leaves 1000 / (1 + w) terms after a while; 50 are wanted, which is w = 19."""
    control = ActiveTerms(50)
    assert control.factor == 1.0
    active = 1000.0
    for _ in range(300):
        control.update(active)
        active = 0.8 * active + 0.2 * 1000 / (1 + control.factor)
    assert active == pytest.approx(50, rel=0.02)
    assert control.factor == pytest.approx(19, rel=0.05)
    other = ActiveTerms(50)
    other.load_state_dict(control.state_dict())
    assert other.factor == control.factor
    for _ in range(1000):
        control.update(0.0)
    assert control.integral == -ActiveTerms.LIMIT
