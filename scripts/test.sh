#!/usr/bin/env bash
# The whole suite, from nothing: sets up .venv, then lint, types, tests. Arguments go to pytest, for example:
#   bash scripts/test.sh -m "not slow"
# Tests marked slow use the collections in RKD_DATA and skip, saying so, without it.
EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/ruff check retrieval_kd tests scripts
.venv/bin/ruff format --check retrieval_kd tests scripts
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
