#!/usr/bin/env bash
# Megatron-LM's own pretrain_gpt.py, unchanged: `mnemosyne run` in place of torchrun,
# and --mnemosyne.
#
#   MEGATRON_LM=~/Megatron-LM CPU=1 examples/megatron_gpt/pretrain_gpt.sh tp2_dp2 \
#       --chaos 'kill rank=2 step=20 phase=backward' -- --save runs/checkpoints
#
# LAYOUT is a configs/megatron_LAYOUT.args; it says how many workers there are. Up to
# `--` come options of `mnemosyne run`, behind it those of Megatron.
#
#   MEGATRON_LM  a source tree of Megatron-LM, 0.16 to 0.19
#   CPU=1        without a GPU, by the harness of our tests. Without it each rank takes
#                a GPU, which this version of Mnemosyne refuses yet (README, Limitations)
#   DATA         the corpus, as prepare.py writes it; it is made if it is not there
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
usage="usage: MEGATRON_LM=DIR [CPU=1] $0 LAYOUT [RUN OPTIONS] [-- MEGATRON'S ARGUMENTS]"
layout=${1:?$usage}
shift
if [[ ! -f ${MEGATRON_LM:?$usage}/pretrain_gpt.py ]]; then
    echo "$0: MEGATRON_LM=$MEGATRON_LM has no pretrain_gpt.py" >&2
    exit 2
fi

arguments() { # of a file in configs/, without its comments
    sed 's/#.*//' "$repository/configs/megatron_$1.args"
}
options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
(($#)) && shift

data=${DATA:-$repository/build/corpus}
script=("$MEGATRON_LM/pretrain_gpt.py")
# No argument in these files has a space in it.
# shellcheck disable=SC2207
words=($(arguments gpt) $(arguments "$layout"))
export PYTHONPATH=$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron insists on it for tensor parallelism
if [[ -n ${CPU:-} ]]; then
    script=("$repository/tests/megatron/on_cpu.py" "${script[@]}")
    # shellcheck disable=SC2207
    words+=($(arguments cpu))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
if [[ ! -f $data.idx ]]; then
    python "$repository/examples/megatron_gpt/prepare.py" --output "$data"
fi

sizes=${layout//[a-z]/} # tp2_pp2_dp2: 2_2_2
exec mnemosyne run --nproc-per-node=$((${sizes//_/*})) --standby=1 \
    ${options[@]+"${options[@]}"} "${script[@]}" --mnemosyne "${words[@]}" \
    --data-path "$data" --data-cache-path "$data.cache" "$@"
