"""A learned head over the vectors of a query and a document, and the folder that holds both parts.

The encoder is saved as Sentence Transformers saves it, the head beside it: pair_head.json says how it
is made, pair_head.safetensors holds its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import import_from_string
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retrieval_kd import pooling
from retrieval_kd.files import read_json, write_json
from retrieval_kd.towers import Towers
from retrieval_kd.types import InputError

Features = Literal["concat", "products"]
CHUNK_ELEMENTS = 2**24  # numbers of pair features held at once, 64 MiB
OURS = {f"{pooling.__name__}.{kind.__name__}": kind for kind in (pooling.PMA, pooling.TopLayers)}


class PairHead(nn.Module):
    """A multi-layer perceptron with ReLUs, from features of two vectors u and v to one score.

    Features are [u; v] (`concat`: D2LLM's interaction emulation, arXiv:2406.17262) or [u; v; u*v; |u-v|]
    (`products`: DSE, arXiv:1908.05161).
    """

    def __init__(self, dim: int, features: Features = "products", hidden: Sequence[int] = (512,)) -> None:
        super().__init__()
        self.settings = {"dim": dim, "features": features, "hidden": list(hidden)}
        widths = [dim * (4 if features == "products" else 2), *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Scores (...) of aligned vectors, (..., D) both."""
        parts = [queries, documents]
        if self.settings["features"] == "products":
            parts += [queries * documents, (queries - documents).abs()]
        return cast(Tensor, self.layers(torch.cat(parts, dim=-1))[..., 0])

    def grid(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Scores (B, U) of every query (B, D) with every document (U, D).

        Documents are taken in chunks, whose features are computed a second time for the gradient
        where there are several: memory is that of one chunk.
        """
        width = cast(nn.Linear, self.layers[0]).in_features
        size = max(1, CHUNK_ELEMENTS // max(1, width * len(queries)))
        chunks = torch.split(documents, size)
        again = torch.is_grad_enabled() and len(chunks) > 1
        blocks = [
            checkpoint(self._block, queries, chunk, use_reentrant=False) if again else self._block(queries, chunk)
            for chunk in chunks
        ]
        return torch.cat(blocks, dim=1)

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        write_json(folder / "pair_head.json", self.settings)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "pair_head.safetensors")

    def _block(self, queries: Tensor, documents: Tensor) -> Tensor:
        shape = (len(queries), len(documents), -1)
        return cast(Tensor, self(queries[:, None].expand(shape), documents[None].expand(shape)))


def load_head(folder: Path) -> PairHead:
    """Read the head that lies in a folder; InputError where there is none."""
    if not (folder / "pair_head.json").exists():
        raise InputError(f"{folder} has no pair_head.json: it was not saved by a pair_head student.")
    head = PairHead(**read_json(folder / "pair_head.json"))
    head.load_state_dict(load_file(folder / "pair_head.safetensors"))
    return head.eval()


def load_pair_encoder(
    folder: Path,
    max_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
) -> Towers:
    """Load the encoder of a saved pair_head student; `max_length` can only shorten.

    Poolings of this package need no trust_remote_code here; other packages' modules are refused.
    """
    modules = [
        _module_class(folder, entry["type"]).load(str(folder), subfolder=entry["path"], local_files_only=True)
        for entry in read_json(folder / "modules.json")
    ]
    if max_length is not None:
        modules[0].max_seq_length = min(max_length, modules[0].max_seq_length or max_length)
    prompts = read_json(folder / "config_sentence_transformers.json")["prompts"]
    given = {"query": query_prompt, "document": document_prompt}
    towers = one_tower(modules, prompts | {side: prompt for side, prompt in given.items() if prompt is not None})
    towers.model.eval()
    return towers


def one_tower(modules: Sequence[Any], prompts: dict[str, str]) -> Towers:
    """Towers of one encoder that reads both sides."""
    model: Any = SentenceTransformer(
        modules=list(modules), prompts=dict(prompts), similarity_fn_name="dot", device="cpu"
    )
    both = nn.ModuleList(modules)
    return Towers(model, both, both, prompts.get("query") or "", prompts.get("document") or "")


def _module_class(folder: Path, name: str) -> Any:
    if name in OURS:
        return OURS[name]
    if not name.startswith("sentence_transformers."):
        raise InputError(
            f"{folder}/modules.json names {name}, which belongs neither to this package nor to its library."
        )
    return import_from_string(name)
