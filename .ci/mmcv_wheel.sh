#!/usr/bin/env bash
# Sourced by install_dense.sh and run_tests.sh: adds requirements-dense.txt to .venv, with an mmcv that fits its torch.
#
# PyPI has mmcv as a source only, and one build serves one torch minor version, one Python and one kind of device. Built
# wheels are kept in ${XDG_CACHE_HOME:-~/.cache}/vision-ssm/wheels under such a name. On a machine without a GPU the build
# takes 2 to 6 minutes on two cores, with CUDA about 26 minutes per architecture (MMCV_CUDA=1 or 0 overrules the choice).

mmcv_wheel() {
    local version python="$PWD/.venv/bin/python" cuda key cache
    version=$(sed -n 's/^mmcv==//p' requirements-dense.txt)
    cuda=${MMCV_CUDA:-$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')}
    key=$("$python" -c 'import sys, torch
build = torch.__version__.split("+")[-1] if sys.argv[1] == "1" else "cpu"
print("torch%s-py%d%d-%s" % (".".join(torch.__version__.split(".")[:2]), *sys.version_info[:2], build))' "$cuda")
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/vision-ssm/wheels/mmcv-$version-$key
    if ! compgen -G "$cache/mmcv-*.whl" >/dev/null; then
        build_mmcv "$version" "$cuda" "$cache" >&2 || return 1
    fi
    echo "$cache"/mmcv-*.whl
}

build_mmcv() {
    local version=$1 cuda=$2 cache=$3 work python="$PWD/.venv/bin/python" flags="-O2 -g0 -DNDEBUG -pthread"
    echo "building mmcv $version with its operators (once per torch version; kept in $cache)"
    work=$(mktemp -d)
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
        -d "$work" "mmcv==$version" || return 1
    tar -xzf "$work"/mmcv-*.tar.gz -C "$work" || return 1
    if [ "$cuda" = 0 ]; then
        # nearly all of each file's time goes into torch's headers: compile them once
        local header=mmcv/ops/csrc/common/pytorch_cpp_helper.hpp
        (cd "$work/mmcv-$version" && precompile_header "$header" "$flags") || return 1
        flags="$flags -include $work/mmcv-$version/$header"
    fi
    (
        cd "$work/mmcv-$version"
        # CFLAGS replaces the flags of setuptools, -O included
        CFLAGS=$flags MMCV_WITH_OPS=1 FORCE_CUDA=$cuda MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH="$(dirname "$python"):$PATH" \
            "$python" -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w wheel .
    ) || { echo "error: mmcv $version could not be built; the reason is above, the sources are in $work" >&2; return 1; }
    mkdir -p "$cache"
    # renamed into place: a half-copied wheel must not be found
    cp "$work/mmcv-$version"/wheel/mmcv-*.whl "$cache/partial" && mv "$cache/partial" "$cache/$(basename "$work/mmcv-$version"/wheel/mmcv-*.whl)"
    rm -rf "$work"
}

# precompile_header HEADER FLAGS: the flags that change the language must be those of torch's extension builder, or the
# compiler ignores the result and reads the header again.
precompile_header() {
    local includes
    includes=$("$python" -c 'import sysconfig
from torch.utils.cpp_extension import include_paths
paths = [*include_paths(), sysconfig.get_path("include"), "mmcv/ops/csrc/common"]
print(" ".join(f"-isystem {path}" if "torch" in path else f"-I{path}" for path in paths))')
    # shellcheck disable=SC2086
    c++ -x c++-header $2 -fPIC -std=c++17 -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext \
        -I"$(dirname "$1")" $includes "$1" -o "$1.gch"
}

dense_environment_key() {
    { environment_key; cat requirements-dense.txt .ci/mmcv_wheel.sh; } | sha256sum | cut -d' ' -f1
}

dense_is_set_up() {
    [ -f .venv/installed-dense ] && [ "$(cat .venv/installed-dense)" = "$(dense_environment_key)" ]
}

setup_dense_environment() {
    dense_is_set_up && return
    begin_setup .venv/bin/python
    dense_is_set_up || install_dense_environment
    end_setup
}

install_dense_environment() {
    local key wheel
    key=$(dense_environment_key)
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep ^ninja requirements-dense.txt)"
    wheel=$(mmcv_wheel)
    echo "installing the OpenMMLab packages"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$wheel" -r requirements-dense.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        "$(sed -n 's/^# without its dependencies: \([^ ]*\).*/\1/p' requirements-dense.txt)"
    check_packages
    # opencv-python needs libraries of a desktop
    .venv/bin/python -c 'import cv2' 2>/dev/null || .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --force-reinstall --no-deps "$(grep -o '^opencv-python==[0-9.]*' requirements-dense.txt | sed 's/python/python-headless/')"
    # a wheel without operators imports, too; these are what Mask R-CNN needs
    .venv/bin/python -c 'from mmcv.ops import nms, roi_align; import py_sod_metrics'
    echo "$key" >.venv/installed-dense
}
