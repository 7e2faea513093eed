#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: bash kernels/benchmarks/gpu_suite.sh OUT_FOLDER
#
# Builds the compiled operators for this GPU, runs the GPU tests, times the operators and whole models, and writes
#   verdict.md (one page)  environment.txt  check.txt  parts.csv  log.txt
#   operators.{csv,png}  models-eager.{csv,png}  models-compiled.{csv,png}
# into OUT_FOLDER, in place of what has these names there. Needs no network: PYTHON (.venv/bin/python if there is one,
# else python3) must hold torch, triton, timm, matplotlib, pytest, pip and setuptools; nvcc must be in CUDA_HOME or on
# the PATH. A part that fails or runs out of time does not stop the others; the exit status is then 1, and the last line
# names it. Without a GPU the status is 2.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bash kernels/benchmarks/gpu_suite.sh OUT_FOLDER" >&2
    exit 2
fi
out=$(realpath -m "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi

capability=$("$PYTHON" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"error: {sys.executable} cannot import torch ({error}); PYTHON=/path/to/python names another one")
if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} finds no GPU here; nothing was built or measured")
print("%d.%d" % torch.cuda.get_device_capability())
') || exit 2

failed=()

# part NAME SECONDS COMMAND...
part() {
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    echo "==== $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@"
    status=$?
    echo "==== $name: status $status after $((SECONDS - start)) s"
    local result=passed
    case $status in
    0) ;;
    124 | 137) result="out of time" ;;
    *) result="status $status" ;;
    esac
    [ "$result" = passed ] || failed+=("$name ($result)")
    echo "$name,$result,$((SECONDS - start)),$seconds" >>"$out/parts.csv"
}

commit() {
    git rev-parse --verify --quiet HEAD || { echo "unknown (no git here)"; return; }
    git diff --quiet HEAD || echo "with uncommitted changes"
}

environment() {
    echo "date: $(date -u +%FT%TZ)"
    echo "commit: $(commit 2>/dev/null | paste -sd " ")"
    "$PYTHON" -c '
import importlib.metadata, platform, torch
print(f"gpu: {torch.cuda.get_device_name()}, compute capability {torch.cuda.get_device_capability()}")
print(f"torch: {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
for name in ("triton", "timm", "mamba-ssm"):
    try:
        print(f"{name}: {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"{name}: not installed")
print(f"python: {platform.python_version()}")'
    echo "nvcc: $("${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --version 2>&1 | grep release || echo "not found")"
    nvidia-smi --format=csv \
        --query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit 2>&1
}

# One library after the other, each by its name: then a failure is an error that shows its reason.
build() {
    if ! "$PYTHON" -c 'import setuptools, pip; assert int(setuptools.__version__.split(".")[0]) >= 77'; then
        echo "error: building needs pip and setuptools 77 or newer in $PYTHON, and they cannot be fetched from here"
        return 1
    fi
    local status=0 kind
    for kind in cpu cuda; do
        SSM_OPS_BUILD=$kind "$PYTHON" -m pip install -e . --no-build-isolation --no-deps || status=1
    done
    "$PYTHON" -m ssm_ops || status=1
    return $status
}

# The doctor's table of what is right; `set -o pipefail` keeps its status.
check() {
    "$PYTHON" -m ssm_ops --check --device cuda:0 | tee "$out/check.txt"
}

# The limits: nvcc compiles seven files for one GPU, two at a time; the check and the tests wait for Triton's compiler; five of
# the smoke runs are trainings, in processes that take longer to start than to train; a timed way of a case takes what
# do_bench spends, a quarter of a second; models-compiled waits for torch.compile. With 5 seconds for the end of each they
# make less than nine minutes.
main() {
    local benchmarks=kernels/benchmarks names models
    models=("$PYTHON" $benchmarks/models.py --device cuda --dtype bfloat16 --channels-last)
    environment | tee "$out/environment.txt"
    echo "part,result,seconds,limit" >"$out/parts.csv"
    part build 90 bash -c build
    part check 60 bash -c check
    part tests 105 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --ignore tests/gpu tests
    part smoke 75 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/gpu
    part operators 60 "$PYTHON" $benchmarks/run.py --device cuda --dtype bfloat16 --batch 32 --out "$out/operators.csv"
    part models-eager 35 "${models[@]}" --out "$out/models-eager.csv"
    part models-compiled 60 "${models[@]}" --compile --out "$out/models-compiled.csv"
    "$PYTHON" $benchmarks/verdict.py "$out"
    if [ ${#failed[@]} -gt 0 ]; then
        printf -v names '%s, ' "${failed[@]}"
        echo "FAILED: ${names%, }"
        return 1
    fi
    echo "all parts passed, results in $out"
}

mkdir -p "$out" || exit 2
rm -f "$out"/{environment,check,log}.txt "$out"/{parts.csv,verdict.md} "$out"/{operators,models-eager,models-compiled}.{csv,png}
export out PYTHON TORCH_CUDA_ARCH_LIST=$capability PYTHONUNBUFFERED=1
# Should the build fail, the parts that need none still find the packages.
export PYTHONPATH=$PWD/kernels:$PWD/classification${PYTHONPATH:+:$PYTHONPATH}
export -f build check
main 2>&1 | tee "$out/log.txt"
