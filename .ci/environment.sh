# Sourced by quickstart.sh and run_tests.sh: makes .venv with requirements.txt and this repository, or reuses it.
# PYTHON=... chooses the interpreter (3.10 to 3.13). A torch that is already in .venv is kept; TORCH_INDEX_URL=...
# chooses the package index that a new one comes from.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10});" \
        "install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

# A name for the state that .venv must have; changes with any file that decides what is installed, and with the place.
environment_key() {
    { pwd; cat requirements.txt pyproject.toml setup.py .ci/environment.sh kernels/csrc/*/*; } | sha256sum | cut -d' ' -f1
}

# begin_setup PYTHON: nobody else sets up .venv until end_setup, or until this shell ends, however it ends.
begin_setup() {
    exec 9>.setup.lock
    "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    echo "error: another process is setting up $PWD/.venv: wait for it and run this command again" >&2
    return 1
}

end_setup() {
    exec 9>&-
}

is_set_up() {
    [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$(environment_key)" ]
}

setup_environment() {
    local python
    is_set_up && return
    python=$(find_python)
    begin_setup "$python"
    is_set_up || install_environment
    end_setup
}

# pip check, without what is installed against the versions in its metadata (see requirements-dense.txt).
check_packages() {
    local conflicts
    conflicts=$({ .venv/bin/python -m pip check || true; } | grep -v -e '^pysodmetrics ' -e '^No broken requirements') || return 0
    echo "$conflicts" >&2
    return 1
}

cpu_torch=https://download.pytorch.org/whl/cpu # the same torch without CUDA, which is most of its size
patience=5                                     # seconds that this index has to answer

has_nvidia_driver() {
    command -v nvidia-smi >/dev/null || [ -e /proc/driver/nvidia ]
}

# A web server that does not exist, refuses or is silent is given up after $patience seconds, name lookup included.
answers() {
    timeout "$patience" .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1])' "$1" 2>/dev/null
}

# The index that torch comes from; nothing for pip's own. Only on Linux does that one bring CUDA along.
torch_index() {
    if [ -n "${TORCH_INDEX_URL+given}" ]; then
        echo "$TORCH_INDEX_URL"
    elif [ "$(uname -s)" = Linux ] && ! has_nvidia_driver && answers "$cpu_torch/torch/"; then
        echo "$cpu_torch"
    fi
}

# Installs torch where it does not come from pip's own index: requirements.txt is content with it. An index that was chosen here must not end a first run.
install_torch() {
    local index
    index=$(torch_index)
    [ -n "$index" ] || return 0
    echo "taking torch from $index; TORCH_INDEX_URL=URL names another index, TORCH_INDEX_URL= takes pip's own"
    # shellcheck disable=SC2046  # one word for each package
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --timeout 20 --retries 1 \
        --index-url "$index" $(grep -E '^torch(vision)?==' requirements.txt) && return
    [ -z "${TORCH_INDEX_URL+given}" ] || return 1
    echo "torch cannot be had from $index: taking pip's own index"
}

install_environment() {
    local key wanted
    key=$(environment_key)
    if [ ! -x .venv/bin/python ]; then
        local python
        python=$(find_python)
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    wanted=$(mktemp)
    if .venv/bin/python -c 'import torch, torchvision' 2>/dev/null; then
        echo "keeping the torch that is in .venv: $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
        grep -v -E '^(torch|triton)' requirements.txt >"$wanted" # triton fits one torch alone
    else
        install_torch
        cp requirements.txt "$wanted"
    fi
    echo "installing requirements (the first time takes some minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$wanted"
    rm "$wanted"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
    check_packages
    echo "$key" >.venv/installed
}
