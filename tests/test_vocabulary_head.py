"""The head in parts gives what the dense computation gives: values, and every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval_kd import vocabulary_head
from retrieval_kd.vocabulary_head import pool_vocabulary

TEXTS, TOKENS, WIDTH, TERMS = 5, 7, 6, 53


def dense(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, pooling: str, double: bool) -> Tensor:
    """The definition, with the whole tensor (n, L, V)."""
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    active = torch.log1p(torch.relu(logits))
    active = (torch.log1p(active) if double else active) * mask[..., None]
    return active.amax(1) if pooling == "max" else active.sum(1)


def inputs(seed: int = 0, shift: float = -1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random states, of which few logits are positive; the mask leaves out tokens at either end, of one text all."""
    make = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(TEXTS, TOKENS, WIDTH, generator=make), torch.randn(TERMS, WIDTH, generator=make)
    bias = torch.randn(TERMS, generator=make) + shift
    mask = torch.ones(TEXTS, TOKENS, dtype=torch.int64)
    mask[1, 4:], mask[2, :3], mask[3, 1:], mask[4] = 0, 0, 0, 0
    return hidden, mask, weight, bias


def gradients(function: Any, wanted: Tensor, pooling: str, double: bool, with_bias: bool, shift: float) -> list[Tensor]:
    hidden, mask, weight, bias = inputs(shift=shift)
    learned = [tensor.requires_grad_() for tensor in (hidden, weight, *([bias] if with_bias else []))]
    values = function(hidden, mask, weight, bias if with_bias else None, pooling, double)
    values.backward(wanted)
    return [values.detach(), *(tensor.grad for tensor in learned if tensor.grad is not None)]


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("part_bytes", [1, 4 * TEXTS * TOKENS * 20, 2**20])
@pytest.mark.parametrize("shift", [-1.0, 2.0])
def test_values_and_gradients_are_the_dense_ones(
    pooling: str, double: bool, with_bias: bool, part_bytes: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_head, "PART_BYTES", part_bytes)
    wanted = torch.randn(TEXTS, TERMS, generator=torch.Generator().manual_seed(9))
    wanted[:, ::3] = 0  # terms that nobody asks for
    found = gradients(pool_vocabulary, wanted, pooling, double, with_bias, shift)
    expected = gradients(dense, wanted, pooling, double, with_bias, shift)
    assert len(found) == len(expected) == (4 if with_bias else 3)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_the_gradient_of_finite_differences() -> None:
    hidden, mask, weight, bias = (tensor.double() for tensor in inputs())
    wanted = torch.randn(TEXTS, TERMS, dtype=torch.float64)

    def total(states: Tensor, pooling: str) -> float:
        return float((dense(states, mask, weight, bias, pooling, True) * wanted).sum())

    for pooling in ("max", "sum"):
        states = hidden.float().requires_grad_()
        pool_vocabulary(states, mask, weight.float(), bias.float(), pooling, True).backward(wanted.float())
        assert states.grad is not None
        for place in ((0, 0, 0), (1, 3, 2), (4, 6, 5)):
            step = torch.zeros_like(hidden)
            step[place] = 1e-5
            slope = (total(hidden + step, pooling) - total(hidden - step, pooling)) / 2e-5
            assert float(states.grad[place]) == pytest.approx(slope, abs=1e-3)


def test_gradients_add_up_in_a_tied_table() -> None:
    """The table of input embeddings is the head too: both uses reach its `.grad`."""
    hidden, mask, weight, _ = inputs()
    table = weight.clone().requires_grad_()
    (pool_vocabulary(hidden, mask, table, None).sum() + table.sum()).backward()
    alone = weight.clone().requires_grad_()
    pool_vocabulary(hidden, mask, alone, None).sum().backward()
    assert alone.grad is not None
    torch.testing.assert_close(table.grad, alone.grad + 1)


def test_golden_values() -> None:
    """One token whose logits are -1, 0, 1 and 4."""
    weight = torch.tensor([[-1.0], [0.0], [1.0], [4.0]])
    one = torch.ones(1, 1, 1)
    single = pool_vocabulary(one, torch.ones(1, 1), weight, None)
    torch.testing.assert_close(single, torch.tensor([[0.0, 0.0, math.log(2), math.log(5)]]))
    double = pool_vocabulary(one, torch.ones(1, 1), weight, None, double=True)
    torch.testing.assert_close(double, torch.tensor([[0.0, 0.0, 0.526589, 0.959135]]), atol=1e-6, rtol=0)


def test_under_autocast_products_are_in_bf16_and_weights_in_float32() -> None:
    hidden, mask, weight, bias = inputs()
    exact = pool_vocabulary(hidden, mask, weight, bias)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = pool_vocabulary(hidden, mask, weight, bias)
    rounded.sum().backward()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0.03)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
