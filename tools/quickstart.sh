#!/usr/bin/env bash
# Install, fetch MovieLens-1M, and train COMET+ for one epoch on two ranks, through TorchX.
# usage: tools/quickstart.sh [key=value ...], for example: tools/quickstart.sh train.max_steps=200
set -euo pipefail
. "$(dirname "$0")/venv.sh"

make_venv
say "fetching MovieLens-1M (once)"
dist-moe data fetch movielens-1m

run_dir="${DIST_MOE_RUN_DIR:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}"
say "training COMET+ on two ranks, eight experts on each; the run goes to $run_dir"
torchx run -s local_cwd --wait --log launch/components.py:train \
    --config configs/movielens_comet_plus.yaml --ranks 2 --run_dir "$run_dir" \
    parallel.expert_parallel_size=2 "$@"

say "to look at it: .venv/bin/tensorboard --logdir $(dirname $run_dir)"
say "the same figures again, from the checkpoint: .venv/bin/dist-moe evaluate $run_dir"
