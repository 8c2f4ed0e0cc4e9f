"""Work shared by processes: each encodes its share of the batch, and all of them see the whole of it.

Every process then computes the same loss, of the global batch, and its gradient flows back to its own
share alone. Gradients of the weights are therefore summed over processes, and the run equals that of
one process on the same batch: in-batch relations, queues and FLOPS are those of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def process() -> tuple[int, int]:
    """The number of this process, and of all processes: (0, 1) when there is one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def encode_sorted(
    items: Sequence[T],
    lengths: Sequence[int],
    encode: Callable[[list[T]], Tensor],
    micro_batch_tokens: int,
    gradient_caching: bool = False,
) -> Tensor:
    """Encode `items` in micro-batches of similar length: (n, ...) in the order given.

    `encode` maps a list of items to a tensor with a row for each. `lengths` are in tokens, and a
    micro-batch holds at most `micro_batch_tokens`, padding included, or one item: so little is padding,
    and short texts go many at a time. Processes share the items. With `gradient_caching`
    nothing but the result is kept of a micro-batch, which is encoded a second time when its gradient is
    due: memory is that of one micro-batch whatever n is, the random numbers are the same ones, and so is
    the gradient.
    Source: Gao et al. 2021, arXiv:2101.06983; recomputing: Chen et al. 2016, arXiv:1604.06174.
    """
    rank, world = process()
    order = np.argsort(lengths, kind="stable")
    extra = np.repeat(order[-1:], -len(order) % world)  # equal shares: the longest item may come twice
    share = np.concatenate([order, extra])[rank::world]
    pieces = []
    for places in micro_batches(share, [lengths[place] for place in share], micro_batch_tokens):
        chunk = [items[place] for place in places]
        if gradient_caching and torch.is_grad_enabled():
            pieces.append(cast(Tensor, checkpoint(encode, chunk, use_reentrant=False)))
        else:
            pieces.append(encode(chunk))
    whole = gather(torch.cat(pieces))  # rank 0's rows, rank 1's rows, ...
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order)) % world * len(share) + np.arange(len(order)) // world
    return whole[torch.from_numpy(place_of).to(whole.device)]


def micro_batches(places: NDArray[np.int64], lengths: Sequence[int], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Consecutive pieces of `places`, whose `lengths` rise, of at most so many tokens when padded."""
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or lengths[end] * (end + 1 - start) > tokens:
            yield places[start:end]
            start = end


def batches(lengths: Sequence[int], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Places that go together, the longest first, so that too little memory shows at once.

    `lengths` are in tokens, and a batch holds at most so many `tokens`, padding included, or one item.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        places = order[start : start + max(1, tokens // max(1, lengths[order[start]]))]
        yield places
        start += len(places)


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of every process end to end; the gradient goes to this process's rows alone."""
    return rows if process()[1] == 1 else cast(Tensor, cast(Any, _Gather).apply(rows))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        pieces = [torch.empty_like(rows) for _ in range(process()[1])]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rank, world = process()
        return gradient.chunk(world)[rank]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one message."""
    if process()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # of no use to this process's share, but perhaps to another's
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, piece in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(piece.view_as(gradient))
