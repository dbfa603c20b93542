#!/bin/bash
# A pretraining run under Slurm, one task a node, that goes on by itself after its time limit or a preemption:
#   sbatch --nodes 2 examples/slurm.sh --recipe audio --data '/shards/train-*.tar' --run /shared/runs/audio
# Arguments are those of bridle/pretrain.py; DeepSpeed's configuration is CONFIG, builtin:zero2_bf16 unless set.
#SBATCH --job-name=bridle
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

PET_NNODES=$SLURM_JOB_NUM_NODES
PET_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export PET_NNODES PET_MASTER_ADDR PET_MASTER_PORT

# A node that fails ends the others; each task's SLURM_NODEID is known only in the task.
srun --kill-on-bad-exit=1 bash -c 'PET_NODE_RANK=$SLURM_NODEID exec bridle launch -- "$@"' launch \
  --deepspeed_config "${CONFIG:-builtin:zero2_bf16}" "$@"
code=$?

# 75: saved, and asked to stop. Slurm has already put back what it preempted.
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
