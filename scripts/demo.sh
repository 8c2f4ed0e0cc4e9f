#!/usr/bin/env bash
# The demo, from nothing: sets up .venv, then distils MiniLM into a compact query encoder.
# Arguments go to `rkd demo`, for example: bash scripts/demo.sh --json
EXTRAS=demo
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/rkd demo "$@"
