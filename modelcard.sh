#!/usr/bin/env bash
# Every published result, and the command that gives it: bash modelcard.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3 || command -v python || true)
installed='import importlib.util, sys; sys.exit(importlib.util.find_spec("ssm_models") is None)'
if [[ -z $python ]] || ! "$python" -c "$installed"; then
    echo "error: ${python:-no python} has not this repository: bash quickstart.sh installs it" >&2
    exit 2
fi
exec "$python" "$root/analyze/modelcard.py" "$@"
