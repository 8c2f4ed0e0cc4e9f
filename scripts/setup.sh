# Sourced by demo.sh and test.sh: make .venv with the pinned versions, once for each state of the pins.
#   EXTRAS   the extras to install, such as "demo" or "dev"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=".venv/.installed-$EXTRAS-$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable ".[$EXTRAS]"
  touch "$stamp"
fi
