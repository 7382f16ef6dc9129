#!/usr/bin/env bash
# Training on several GPUs: tokens per second, peak memory beside the estimate, and the loss, of each
# strategy on 1, 2, 4 and 8 GPUs, with ZeRO's offloading (deepspeed/*.json) and with QLoRA. Not run:
# it was written on a machine without a GPU, where tests/test_processes.py runs DDP and ZeRO in two
# processes, and only its dry run is tested.
#
#   benchmarks/multi_gpu.sh [--dry-run] MODEL DATA OUTPUT_DIR
set -euo pipefail

run=()
if [[ "${1:-}" == --dry-run ]]; then
  run=(echo)
  shift
fi
if [[ $# -ne 3 ]]; then
  echo "error: wanted MODEL DATA OUTPUT_DIR" >&2
  echo "  fix: benchmarks/multi_gpu.sh [--dry-run] MODEL DATA OUTPUT_DIR" >&2
  exit 2
fi
model=$1 data=$2 output=$3
gpus=${GPUS:-"1 2 4 8"}
strategies=${STRATEGIES:-"ddp zero1 zero2 zero3 fsdp2 zero2-offload zero3-offload"}
quantized=${QUANTIZED:-"ddp zero2"} # strategies of QLoRA
steps=${STEPS:-50}
rows=${ROWS:-16} # of an optimizer step, whatever the number of GPUs
here=$(cd "$(dirname "$0")" && pwd)

# train NAME MODEL STRATEGY COUNT [KEY=VALUE]...
train() {
  local name=$1 from=$2 launch=$3 count=$4
  shift 4
  [[ $launch == *-offload ]] && launch=$here/deepspeed/$launch.json
  "${run[@]}" ar2diff adapt "$from" --recipe llama3.2-1b --data "$data" \
    train.per_device_train_batch_size=1 "train.gradient_accumulation_steps=$((rows / count))" \
    "train.max_steps=$steps" train.schedule=constant train.decay_steps=0 train.logging_steps=5 \
    eval.steps=0 eval.panel_steps=0 "$@" --output-dir "$output/$name-$count" \
    --launch "$launch" --num-processes "$count" --json
}

# An adapter is of a converted model.
"${run[@]}" ar2diff adapt "$model" --recipe llama3.2-1b --max-steps 0 \
  --output-dir "$output/converted" --json
for count in $gpus; do
  "${run[@]}" ar2diff memory "$model" --recipe llama3.2-1b --num-processes "$count" \
    train.per_device_train_batch_size=1
  for strategy in $strategies; do
    train "$strategy" "$model" "$strategy" "$count"
  done
  for strategy in $quantized; do
    train "qlora-$strategy" "$output/converted" "$strategy" "$count" \
      peft.r=16 quantization.kind=nf4
  done
done
