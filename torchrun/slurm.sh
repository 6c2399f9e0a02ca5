#!/bin/bash
#SBATCH --job-name=preference
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
# Run on several nodes, one task a node: the wrapper starts the processes. Two minutes before the time limit the run saves a
# checkpoint and ends with status 75; the job then goes into the queue again and goes on from there.
#   sbatch torchrun/slurm.sh --save_steps 100
# Variables of run_orpo.sh are set in front: model_name_or_path=/models/llama sbatch torchrun/slurm.sh
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
NNODES=$SLURM_NNODES
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES MASTER_ADDR MASTER_PORT
code=0
# shellcheck disable=SC2016  # each task has a SLURM_NODEID of its own
srun bash -c 'NODE_RANK=$SLURM_NODEID exec sh torchrun/run_multi_node.sh "$@"' run "$@" || code=$?
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
