#!/usr/bin/env bash
# From nothing to a trained and evaluated model, on the CPU or the GPU: bash quickstart.sh
# Trains vmamba_nano on scikit-learn's handwritten digits and leaves everything in runs/quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
setup_environment

# Threads that wait for each other without spinning: on a machine that is busy otherwise, spinning costs most of the speed.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

run=runs/quickstart
.venv/bin/python -m ssm_train.data.digits --out runs/data/digits
.venv/bin/python classification/main.py \
    --cfg configs/classification/vmamba/vmamba_nano_digits.yaml --data-path runs/data/digits --output "$run" --fresh
.venv/bin/python analyze/predictions.py --run "$run" --data-path runs/data/digits
echo "report.md, curves.png, predictions.png, metrics.json and checkpoints are in $PWD/$run"
.venv/bin/python - "$run/metrics.json" <<'EOF'
import json, sys
metrics = json.load(open(sys.argv[1]))
print(f"top-1 {metrics['top1']:.2f}% on {metrics['images']} held-out images after {metrics['seconds']:.0f} s")
EOF
