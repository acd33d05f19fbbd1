#!/usr/bin/env bash
#SBATCH --job-name=fdd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#
# One task a GPU, each in the container, with Slurm and Pyxis. The training's flags are the script's arguments:
#
#   IMAGE=megatron-fdd.sqsh MOUNTS=/shared:/shared sbatch docker/pyxis.sh --load /shared/run --save /shared/run ...
#
# IMAGE is what docker/Dockerfile makes, imported by enroot. Never run here: see docs/install.md.
set -euo pipefail
: "${IMAGE:?set IMAGE: a container image, as srun --container-image takes it}"
MOUNTS=${MOUNTS:-$PWD:$PWD}
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# fdd trains in the process that it is started in where RANK is set.
# shellcheck disable=SC2016  # for the task's own shell, which knows its rank
srun --kill-on-bad-exit=1 --container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$PWD" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec fdd train -- "$@"' fdd "$@"
