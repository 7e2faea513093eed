#!/usr/bin/env bash
# bash docs/deploy/build.sh PROGRAM: predict.cpp with the libtorch that comes with the torch of $PYTHON, else of `python`.
# Takes a minute.
set -euo pipefail
python=${PYTHON:-python}
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
abi=$("$python" -c 'import torch; print(int(torch.compiled_with_cxx11_abi()))')
g++ -O1 -std=c++17 -D_GLIBCXX_USE_CXX11_ABI="$abi" -isystem "$torch/include" \
    -isystem "$torch/include/torch/csrc/api/include" "$(dirname "$0")/predict.cpp" -L"$torch/lib" -Wl,--no-as-needed \
    -ltorch -ltorch_cpu -lc10 -Wl,-rpath,"$torch/lib" -o "$1"
