#!/usr/bin/env bash
# Sets up .venv and runs the tests, several at a time: bash run_tests.sh [--fast | --web] [--all] [pytest arguments]
#   --fast   only what needs no OpenMMLab packages
#   --web    only the documentation's site and the page of analyze/app.py, in a browser
#   --all    also the tests that repeat at length what others hold in short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
source .ci/mmcv_wheel.sh

# .venv-web sees what is in .venv, and has requirements-web.txt beside it, whose Pillow is another one.
setup_web_environment() {
    local mark=.venv-web/installed
    if [ "$(cat "$mark" 2>/dev/null)" != "$(sha256sum requirements-web.txt)" ]; then
        echo "installing requirements-web.txt"
        .venv/bin/python -m venv --clear .venv-web
        echo "import site; site.addsitedir('$(site_packages .venv)')" >"$(site_packages .venv-web)/core.pth"
        .venv-web/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-web.txt
        sha256sum requirements-web.txt >"$mark"
    fi
    command -v chromium >/dev/null && return
    echo "installing chromium"
    { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || {
        echo "error: no chromium was found or could be installed; as root: apt install chromium" >&2
        return 1
    }
}

site_packages() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

setup_environment
if [ "${1:-}" = "--web" ]; then
    shift
    setup_web_environment
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec .venv-web/bin/python -m pytest -m web tests/web "$@"
fi
selection=()
if [ "${1:-}" = "--fast" ]; then
    selection=(-m "not dense")
    shift
else
    setup_dense_environment
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a thread for each of the processes: more would fight for the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_REQUIRE_VIRTUALENV=1
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "${selection[@]}" "$@"
