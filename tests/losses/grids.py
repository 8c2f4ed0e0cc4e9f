"""Inputs that the tests of losses share, and how a loss is called on them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_kd.losses import find_loss, loss_names

# Section 31 of the specification.
S = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, -0.5, 0]], dtype=torch.float64)
T = torch.tensor([[3, 2.5, -1, 0], [1, 0, 2, -2]], dtype=torch.float64)
ALL = torch.ones(2, 4, dtype=torch.bool)
FIRST = torch.tensor([[True, False, False, False]] * 2)
X = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
Y = torch.tensor([[2, 0], [0, 1], [1, 2]], dtype=torch.float64)

SCORES = [name for name in loss_names() if find_loss(name).of == "scores"]
VECTORS = [name for name in loss_names() if find_loss(name).of == "vectors"]
# Every loss with its defaults, and the options that change what it computes.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in loss_names()),
    ("approx_rank_mse", {"temperature": 0.5, "discount": "log2"}),
    ("approx_rank_mse", {"discount": "reciprocal"}),
    ("bd_kl", {"favoured": 3.0, "uncertain": "forward", "temperature": 2.0}),
    ("confidence_nce", {"temperature": 0.5}),
    ("dkd", {"alpha": 0.5, "beta": 8.0, "temperature": 2.0}),
    ("huber", {"delta": 0.3}),
    ("info_nce", {"temperature": 0.05}),
    ("info_nce", {"combine": "sum_logits", "temperature": 2.0}),
    ("info_nce", {"combine": "each", "temperature": 2.0}),
    ("js", {"beta": 0.1, "temperature": 3.0}),
    ("js", {"beta": 1.0}),
    ("kl", {"temperature": 2.0}),
    ("kl", {"temperature": 0.5, "teacher_temperature": 3.0}),
    ("kl", {"temperature": 2.0, "squared": False}),
    ("lambda_rank", {"scheme": "lambda"}),
    ("lambda_rank", {"scheme": "ndcg2", "k": 2}),
    ("lambda_rank", {"scheme": "ndcg2++", "k": 1}),
    ("listnet", {"temperature": 0.5, "teacher_temperature": 2.0}),
    ("mixed_kl", {"forward": 2.0, "reverse": 0.3, "temperature": 2.0, "squared": False}),
    ("partial_pl", {"depth": 1}),
    ("partial_pl", {"depth": 9}),
    ("pld", {"teacher_temperature": 4.0}),
    ("preference_kl", {"temperature": 2.0}),
    ("rank_distil", {"depth": 2}),
    ("rank_distil", {"depth": 3, "penalty": "hinge", "margin": 0.5, "weight": 2.0, "temperature": 2.0}),
    ("ranknet", {"weights": "gap"}),
    ("ranknet", {"weights": "squared_gap"}),
    ("reverse_kl", {"temperature": 2.0, "teacher_temperature": 1.5}),
    ("sinkhorn", {"temperature": 1.0, "epsilon": 0.5, "iterations": 5, "slots": "column"}),
    ("skew_kl", {"skew": 0.7, "temperature": 2.0}),
    ("skew_kl", {"skew": 0.0}),
]


def case_name(case: tuple[str, dict[str, Any]]) -> str:
    """The loss and its options, for the name of a test."""
    return "-".join([case[0], *(f"{value}" for value in case[1].values())])


def make_grids() -> dict[str, Tensor]:
    """All that a loss may ask for, of 7 rows and 5 places; NaN and -inf wherever nothing is valid or asked."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 7, 5)) * 2
    valid = rng.random((7, 5)) < 0.75
    valid[:, 0] = True
    valid[4] = [False, True, False, True, True]  # column 0 missing
    valid[5] = [True, False, False, False, False]  # one place alone
    valid[6] = False
    student[~valid] = rng.choice([np.nan, -np.inf, 3.0], (~valid).sum())
    teacher[~valid] = rng.choice([np.nan, -np.inf], (~valid).sum())
    positive = rng.random((7, 5)) < 0.4
    positive[0] = False
    positive[1] = True  # nothing else in the row
    preference = rng.random((7, 5, 5))
    preference[rng.random((7, 5, 5)) < 0.5] = np.nan
    preference[2, 0, 1], preference[2, 1, 0] = 1.0, 0.0
    named = {"student": student, "teacher": teacher, "valid": valid, "positive": positive, "preference": preference}
    return {name: torch.tensor(array) for name, array in named.items()}


def inputs(name: str) -> dict[str, Tensor]:
    """What the loss called `name` is given: of `make_grids`, or vectors of 6 texts."""
    loss = find_loss(name)
    if loss.of == "vectors":
        rng = np.random.default_rng(8)
        student, teacher = rng.normal(size=(2, 6, 4))
        student[3] = student[1]  # two texts alike: no distance, no angle
        return {"student": torch.tensor(student), "teacher": torch.tensor(teacher)}
    return {key: grid for key, grid in make_grids().items() if key in {"student", "valid", *loss.needs}}


def value_of(
    name: str, given: Mapping[str, Tensor], options: Mapping[str, Any] = MappingProxyType({}), **more: Tensor
) -> Tensor:
    """The loss of the named inputs."""
    return find_loss(name).function(**{**given, **options, **more})
