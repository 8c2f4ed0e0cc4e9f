"""What terms and penalties remember from step to step: TAID's share, vectors, a policy over teachers, active terms.

Their state is part of a checkpoint, so a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_kd.stages import Interpolate, Select, Term


class Taid:
    """TAID's interpolation: the share `tau` of the teacher in the target, raised faster while the loss falls.

    tau <- min(end, max(start + (end - start) * progress, tau + alpha * sigmoid(m) * (1 - tau))), with m
    the running mean of the loss's relative decrease; the first call only stores the loss.
    Source: Shing et al. 2025, arXiv:2501.16937, and its code.
    """

    def __init__(self, settings: Interpolate) -> None:
        self.settings = settings
        self.tau = settings.start
        self.previous: float | None = None
        self.decrease = 0.0

    def update(self, loss: float, progress: float) -> None:
        """Learn the loss of a step; `progress` is the share of the steps that are done."""
        settings = self.settings
        if self.previous is not None:
            change = (self.previous - loss) / (self.previous + 1e-15)
            self.decrease = settings.momentum * self.decrease + (1 - settings.momentum) * change
            step = settings.alpha / (1 + math.exp(-self.decrease)) * (1 - self.tau)
            floor = settings.start + (settings.end - settings.start) * progress
            self.tau = min(settings.end, max(floor, self.tau + step))
        self.previous = loss


class Queue:
    """The teacher's vectors of earlier steps, first in, first out; the teacher is fixed, so they never go stale."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.vectors: Tensor | None = None  # (m, D)
        self.texts: Tensor | None = None  # (m,)

    def read(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (m, D) and text numbers (m,); m is 0 in the first step."""
        if self.vectors is None or self.texts is None:
            return like.new_zeros(0, like.shape[1]), torch.zeros(0, dtype=torch.int64, device=like.device)
        return self.vectors.to(like.device), self.texts.to(like.device)

    def push(self, vectors: Tensor, texts: Tensor) -> None:
        """Add a batch and let the oldest go."""
        known, numbers = self.read(vectors)
        self.vectors = torch.cat([known, vectors.detach()])[-self.size :] if self.size else known
        self.texts = torch.cat([numbers, texts])[-self.size :] if self.size else numbers


class Selection:
    """A Bernoulli policy that takes or leaves each teacher for each query, trained by REINFORCE.

    P(taken) = sigmoid(w . x + b) on features x of the teacher's list. The reward of a choice is minus the
    student's loss on the batch that follows the update it led to, less a running mean.
    Source: Yuan et al. 2021, arXiv:2012.06048; features and reward are our transfer to ranked lists.
    """

    FEATURES = 4  # entropy, rank of the positive, divergence from the student, agreement with the other teachers

    def __init__(self, settings: Select) -> None:
        self.settings = settings
        self.weights = np.zeros(self.FEATURES + 1)
        self.baseline: float | None = None
        self.pending: NDArray[np.float64] | None = None  # the gradient of log P of the last choice

    def choose(self, features: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Which teachers count for which query. Shapes: features (T, B, F) to (T, B)."""
        inputs = np.concatenate([features, np.ones((*features.shape[:2], 1))], axis=2)
        chance = 1 / (1 + np.exp(-inputs @ self.weights))
        taken = rng.random(chance.shape) < chance
        self.pending = ((taken - chance)[..., None] * inputs).mean((0, 1))
        return np.asarray(taken)

    def feedback(self, reward: float) -> None:
        """Reward the last choice."""
        if self.baseline is None:
            self.baseline = reward
        if self.pending is not None:
            self.weights += self.settings.learning_rate * (reward - self.baseline) * self.pending
            self.pending = None
        self.baseline = self.settings.baseline * self.baseline + (1 - self.settings.baseline) * reward


class ActiveTerms:
    """Steers the weight of a penalty until texts have the wanted number of active terms, on average.

    The weight is multiplied by exp(integral + e), e = log(active / wanted) of a running mean, and the
    integral gains RATE * e a step: proportional and integral control, of logarithms. It stays within exp(+-LIMIT), so
    that what could not be reached for long does not take as long to be forgotten.
    """

    RATE, MOMENTUM, LIMIT = 0.05, 0.7, 7.0

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.active: float | None = None
        self.integral = 0.0

    @property
    def factor(self) -> float:
        """What the weight is multiplied by in the next step."""
        return math.exp(self.integral + self._error)

    def update(self, active: float) -> None:
        """Learn how many active terms the texts of a step had."""
        self.active = active if self.active is None else self.MOMENTUM * self.active + (1 - self.MOMENTUM) * active
        self.integral = max(-self.LIMIT, min(self.LIMIT, self.integral + self.RATE * self._error))

    @property
    def _error(self) -> float:
        return 0.0 if self.active is None else math.log(max(self.active, 0.1) / self.wanted)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"active": self.active, "integral": self.integral}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        vars(self).update(state)


class TermState:
    """The controllers of one term; absent ones are None."""

    def __init__(self, term: Term) -> None:
        self.taid = None if term.interpolate is None else Taid(term.interpolate)
        self.queue = Queue(term.queue) if term.relation == "cross" else None
        self.selection = None if term.select is None else Selection(term.select)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return {name: {k: v for k, v in vars(part).items() if k != "settings"} for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for name, values in state.items():
            vars(getattr(self, name)).update(values)
