"""LoRA: a transformer kept as it is, with trainable low-rank updates of some of its linear layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from sentence_transformers.base.modules import Transformer
from torch import nn

from retrieval_kd.extras import missing_extra
from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import InputError


class Lora(Table):
    """Which layers are updated, and how."""

    rank: Positive = 8
    alpha: Positive = 16  # updates are multiplied by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what the updates read
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("query", "value")  # last parts of the layers' names


def add_lora(modules: Sequence[Any] | nn.ModuleList, lora: Lora) -> None:
    """Freeze the transformer that `modules` start with and add updates, which begin at zero, to its targets.

    Source: Hu et al. 2021, arXiv:2106.09685; through peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error

    first: Any = modules[0]
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    last_names = {name.rpartition(".")[2] for name, _ in first.model.named_modules()}
    if unknown := [target for target in lora.targets if target.rpartition(".")[2] not in last_names]:
        raise InputError(
            f"student.lora.targets: {type(first.model).__name__} has no layer called {unknown[0]!r}; "
            f"its layers are called {', '.join(sorted(last_names - {''}))}."
        )
    first.model = get_peft_model(first.model, config)


def merged(model: Any) -> Any:
    """The model with its updates added into its weights, as a copy; the model itself where it has none."""
    if not any(_adapted(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if _adapted(module):
            module.model = module.model.merge_and_unload()
    return model


def _adapted(module: Any) -> bool:
    return isinstance(module, Transformer) and hasattr(module.model, "merge_and_unload")
