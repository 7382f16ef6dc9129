"""Words that people bring from other tools, and what ar2diff has instead."""

from __future__ import annotations

# A verb: what it is called here; the first that the command or group at hand has.
VERBS: dict[str, tuple[str, ...]] = {
    "convert": ("adapt",),
    "pretrain": ("adapt",),
    "finetune": ("sft",),
    "fine-tune": ("sft",),
    "tune": ("sft",),
    "grpo": ("rl",),
    "ppo": ("rl",),
    "distill": ("draft",),
    "infer": ("generate",),
    "inference": ("generate",),
    "sample": ("generate",),
    "predict": ("generate",),
    "complete": ("generate",),
    "infill": ("generate",),
    "evaluate": ("eval",),
    "test": ("eval",),
    "benchmark": ("eval",),
    "inspect": ("check",),
    "verify": ("check",),
    "upload": ("push",),
    "publish": ("push",),
    "merge-lora": ("merge",),
    "env": ("doctor",),
    "info": ("doctor",),
    "estimate-memory": ("memory",),
    "list": ("ls", "schema", "recipes ls"),
    "ls": ("schema", "recipes ls"),
    "cat": ("show", "recipes show"),
    "show": ("config show",),
    "copy": ("cp", "recipes cp"),
    "cp": ("recipes cp",),
    "check": ("validate",),
    "validate": ("config validate",),
    "keys": ("schema",),
    "version": ("--version",),
    "help": ("--help",),
    "completion": ("--show-completion",),
}

TRAIN = (
    "use 'ar2diff adapt' to convert a model, 'ar2diff sft' to tune it on conversations, or "
    "'ar2diff rl' to train it on rewards"
)

# A verb that has no counterpart: what to do instead.
NO_VERB = {
    "train": TRAIN,
    "run": TRAIN,
    "dpo": "use 'ar2diff sft' to tune a model on examples, or 'ar2diff rl' to train it on rewards",
    "login": "use 'hf auth login'",
    "download": "give the Hub id instead of a folder; every verb downloads what it needs",
    "preprocess": "no preparation is needed; 'ar2diff adapt MODEL --data FILE --dry-run' checks "
    "the data",
    "quantize": "train with quantization.bits=4, or quantize an exported model with another tool",
}

# An option: parameters of a verb; the first that the verb has.
OPTIONS: dict[str, tuple[str, ...]] = {
    "m": ("model", "folder", "adapter"),
    "model": ("folder", "adapter"),
    "model_name": ("model", "folder", "adapter"),
    "model_id": ("model", "folder", "adapter"),
    "model_path": ("model", "folder", "adapter"),
    "model_name_or_path": ("model", "folder", "adapter"),
    "pretrained": ("model", "folder", "adapter"),
    "base_model": ("base", "model"),
    "o": ("output_dir", "output"),
    "out": ("output_dir", "output"),
    "output": ("output_dir",),
    "output_dir": ("output",),
    "output_path": ("output_dir", "output"),
    "save_dir": ("output_dir",),
    "d": ("data",),
    "dataset": ("data",),
    "datasets": ("data",),
    "dataset_name": ("data",),
    "dataset_path": ("data",),
    "train_file": ("data",),
    "train_data": ("data",),
    "eval_data": ("data",),
    "dataset_text_field": ("text_field",),
    "r": ("recipe",),
    "config_file": ("recipe",),
    "p": ("prompt",),
    "input": ("prompt",),
    "text": ("prompt",),
    "prompts": ("prompts_file",),
    "n": ("max_new_tokens",),
    "max_tokens": ("max_new_tokens",),
    "max_length": ("max_new_tokens", "length"),
    "num_tokens": ("max_new_tokens",),
    "t": ("temperature",),
    "temp": ("temperature",),
    "stop_sequences": ("stop_strings",),
    "bs": ("batch_size",),
    "resume_from_checkpoint": ("resume",),
    "f": ("overwrite",),
    "force": ("overwrite",),
    "overwrite_output_dir": ("overwrite",),
    "hub_model_id": ("push_to_hub",),
    "repo_id": ("repo", "push_to_hub"),
    "deepspeed": ("launch",),
    "num_gpus": ("num_processes",),
    "nproc_per_node": ("num_processes",),
    "format": ("to",),
    "v": ("version",),
    "V": ("version",),
}

EPOCHS = (
    "give the length of the run as --max-steps; 'rows per step' in the output of --dry-run says "
    "how many rows a step takes"
)

# An option that has no counterpart: what to do instead.
NO_OPTION = {
    "epochs": EPOCHS,
    "num_epochs": EPOCHS,
    "num_train_epochs": EPOCHS,
    "warmup_ratio": "set train.warmup_steps=N",
    "fp16": "leave it out, or set train.precision=bf16",
    "trust_remote_code": "leave it out; ar2diff never runs code from a model's repository",
    "tasks": "run benchmarks with 'ar2diff eval MODEL --tasks TASK'",
    "temperature": "set rl.sampler.temperature=T, which holds for rollouts",
    "reward_funcs": "set rl.rewards='[{name: NAME}]'",
    "rewards": "set rl.rewards='[{name: NAME}]'",
    "device": "choose the devices with the environment variable CUDA_VISIBLE_DEVICES",
    "device_map": "choose the devices with the environment variable CUDA_VISIBLE_DEVICES",
    "fsdp": "use --launch fsdp2",
    "token": "leave it out, and run 'hf auth login' or set the environment variable HF_TOKEN",
    "hub_token": "leave it out, and run 'hf auth login' or set the environment variable HF_TOKEN",
}
