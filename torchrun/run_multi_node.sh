#!/bin/sh
# run_orpo.sh on several machines: start the same command on each, with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC=4 sh torchrun/run_multi_node.sh            on the first machine, 10.0.0.1
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 NPROC=4 sh torchrun/run_multi_node.sh            on the second
#   sh torchrun/run_multi_node.sh NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 --max_steps 20     the same as arguments
#
# Variables, from the environment or as leading NAME=value words:
#   NNODES       machines
#   NODE_RANK    this machine's number, 0 ... NNODES-1
#   MASTER_ADDR  address of machine 0, as the others reach it
#   MASTER_PORT  a port that is free there (default 29500); the same on every machine
#   NPROC        processes on this machine, one a GPU (default: the number of visible GPUs; 2 on a CPU)
#   strategy     ddp: each process holds the whole model; fsdp, zero3: a part of it; zero2, zero3_offload: see README.md
#   MAX_RESTARTS start again from the last checkpoint that many times by itself if a process dies (default 0)
# Elastic, with --rdzv ahead of the other flags, or NNODES=MIN:MAX, or MAX_RESTARTS: the machines meet at MASTER_ADDR, any
# one of them, and number themselves (NODE_RANK is not needed). NNODES=1:4 takes between one and four, whichever are there.
#   sh torchrun/run_multi_node.sh --rdzv NNODES=1:4 MAX_RESTARTS=3 MASTER_ADDR=10.0.0.1     on each
# Every variable and flag of run_orpo.sh counts too, and must be the same on every machine. See README.md here.

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
fail() { printf 'torchrun: %s\n' "$*" >&2; exit 2; }
whole() { case $2 in '' | *[!0-9]*) fail "$1 is a whole number; got '$2'" ;; esac }

rdzv=false
while [ $# -gt 0 ]; do
    case $1 in
    --rdzv) rdzv=true ;;
    NNODES=* | NODE_RANK=* | MASTER_ADDR=* | MASTER_PORT=* | NPROC=* | MAX_RESTARTS=* | strategy=*) eval "${1%%=*}=\${1#*=}" ;;
    --*) break ;;
    *) fail "'$1' is not understood: first NAME=value with NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC, MAX_RESTARTS, strategy, or --rdzv; then flags" ;;
    esac
    shift
done

PYTHON=$(sh "$here/../setup.sh") || exit 1
export PYTHON

# ---- the processes
[ -n "${NNODES:-}" ] || fail "set NNODES, the number of machines (on one machine: torchrun/run_single_node.sh)"
whole NNODES "${NNODES%%:*}"
whole NNODES "${NNODES##*:}"
if [ -z "${NPROC:-}" ]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -gt 0 ]; then NPROC=$gpus; else NPROC=2; fi
fi
whole NPROC "$NPROC"
[ "$NPROC" -gt 0 ] && [ "${NNODES%%:*}" -gt 0 ] && [ "${NNODES##*:}" -ge "${NNODES%%:*}" ] || fail "NPROC and NNODES are at least 1, NNODES=MIN:MAX in that order; got NPROC=$NPROC NNODES=$NNODES"

whole MAX_RESTARTS "${MAX_RESTARTS:=0}"
[ "$MAX_RESTARTS" -eq 0 ] || rdzv=true
[ "${NNODES#*:}" = "$NNODES" ] || rdzv=true
if [ "$NNODES" = 1 ]; then # the port is the system's choice, and no name of this machine needs to be resolved
    TORCHRUN_ARGS="--standalone --local_addr 127.0.0.1 --nproc_per_node $NPROC"
elif [ "$rdzv" = true ]; then # machines meet at MASTER_ADDR and number themselves
    [ -n "${MASTER_ADDR:-}" ] || fail "set MASTER_ADDR, the address of one of the machines as the others reach it"
    MASTER_PORT=${MASTER_PORT:-29500}
    whole MASTER_PORT "$MASTER_PORT"
    TORCHRUN_ARGS="--nnodes $NNODES --nproc_per_node $NPROC --rdzv_backend c10d --rdzv_id orpo"
    TORCHRUN_ARGS="$TORCHRUN_ARGS --rdzv_endpoint $MASTER_ADDR:$MASTER_PORT"
else
    whole NODE_RANK "${NODE_RANK:-}"
    [ "$NODE_RANK" -lt "$NNODES" ] || fail "NODE_RANK goes from 0 to NNODES-1 = $((NNODES - 1)); got $NODE_RANK"
    [ -n "${MASTER_ADDR:-}" ] || fail "set MASTER_ADDR, the address of machine 0 as the other machines reach it"
    MASTER_PORT=${MASTER_PORT:-29500}
    whole MASTER_PORT "$MASTER_PORT"
    TORCHRUN_ARGS="--nnodes $NNODES --node_rank $NODE_RANK --nproc_per_node $NPROC"
    TORCHRUN_ARGS="$TORCHRUN_ARGS --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
fi
[ "$MAX_RESTARTS" -eq 0 ] || TORCHRUN_ARGS="$TORCHRUN_ARGS --max_restarts $MAX_RESTARTS"
export TORCHRUN_ARGS

# Cores are shared among the processes of a machine; without this torch gives every process one.
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=$((cores / NPROC))
[ "$threads" -gt 0 ] || threads=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"

# ---- the strategy
case ${strategy:=ddp} in
ddp) ;;
fsdp) set -- "$@" --strategy fsdp ;;
zero2 | zero3 | zero3_offload)
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' ||
        fail "strategy=$strategy needs DeepSpeed: $PYTHON -m pip install deepspeed; or strategy=fsdp, which needs nothing"
    set -- "$@" --strategy "$strategy"
    ;;
*) fail "strategy=$strategy is unknown; there are ddp, fsdp, zero2, zero3 and zero3_offload" ;;
esac

say="$NNODES machine(s) x $NPROC process(es), strategy=$strategy, OMP_NUM_THREADS=$OMP_NUM_THREADS"
(printf 'torchrun: %s\n' "$say") 2>/dev/null || : # nobody may be reading
trap '' USR1 # Slurm's warning goes to every process: these shells let it pass, the training saves (see launch.py)
exec sh "$here/../run_orpo.sh" "$@"
