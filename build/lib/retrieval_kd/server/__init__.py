"""HTTP: vectors and search with what students export, as OpenAI, TEI and search engines are asked; without torch.

    GET  /                  a page that searches two systems side by side
    POST /v1/embeddings     OpenAI: dense vectors; GET /v1/models lists what is served
    POST /embed             TEI: dense vectors; /embed_sparse: sparse ones; /tokenize: tokens; GET /info
    POST /search            documents of a model's index, with their texts
    GET  /health, /metrics  alive; Prometheus

`Model` is what is served under one name, `create_app` makes the application of several, `serve` listens.
"""

from __future__ import annotations

from retrieval_kd.server.app import create_app
from retrieval_kd.server.batching import Batching
from retrieval_kd.server.errors import Limits
from retrieval_kd.server.models import Model, load_bm25, load_model
from retrieval_kd.server.run import serve

__all__ = ["Batching", "Limits", "Model", "create_app", "load_bm25", "load_model", "serve"]
