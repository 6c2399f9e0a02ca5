#!/bin/sh
# run_orpo.sh on all GPUs of this machine, one process each; without a GPU, on two CPU processes (gloo).
#
#   sh torchrun/run_single_node.sh                       every visible GPU
#   NPROC=4 model_name_or_path=Qwen/Qwen2.5-7B-Instruct template_name=auto sh torchrun/run_single_node.sh
#   sh torchrun/run_single_node.sh NPROC=2 --max_steps 20
#
# Variables, from the environment or as leading NAME=value words:
#   NPROC      processes, one a GPU (default: the number of visible GPUs; 2 on a CPU)
#   strategy   ddp: each process holds the whole model; fsdp, zero3: a part of it; zero2, zero3_offload: see README.md
#   MAX_RESTARTS  start again from the last checkpoint that many times by itself if a process dies (default 0)
# MASTER_PORT is chosen by the system, so that two runs on one machine do not collide.

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec sh "$here/run_multi_node.sh" NNODES=1 NODE_RANK=0 MASTER_ADDR= "$@"
