"""Suggest what was meant by an unknown flag, by a recipe without @ and by a misspelt @file."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

# Flags of other trainers (transformers, peft, sentence-transformers, torchtune, the course), and what does the same.
FLAGS_ELSEWHERE = {
    "learning_rate": "--lr",
    "output_dir": "--run_dir",
    "overwrite_output_dir": "--overwrite",
    "run_name": "--name",
    "num_train_epochs": "--epochs",
    "num_epochs": "--epochs",
    "max_steps": "--epochs and --steps_per_epoch",
    "per_device_train_batch_size": "--batch_size, which counts the examples of all processes together",
    "train_batch_size": "--batch_size",
    "per_device_eval_batch_size": "--eval_batch_size",
    "gradient_accumulation_steps": "--micro_batch_size, which counts sequences",
    "fp16": "--amp --amp_dtype fp16",
    "bf16": "--amp --amp_dtype bf16",
    "mixed_precision": "--amp",
    "random_seed": "--seed",
    "data_seed": "--seed",
    "device": "--use_gpu",
    "model_name_or_path": "--pretrained",
    "model_name": "--pretrained",
    "max_seq_length": "--max_length",
    "max_seq_len": "--max_length",
    "train_file": "--sst_train, and so on for each task",
    "validation_file": "--sst_dev, and so on for each task",
    "optimizer": "--optim",
    "lr_scheduler_type": "--lr_schedule",
    "warmup_ratio": "--warmup with --lr_schedule linear",
    "warmup_steps": "--warmup with --lr_schedule linear, as a share of the epochs",
    "max_grad_norm": "--clip",
    "weight_decay": "--sst_weight_decay, and so on for each task",
    "dropout": "--hidden_dropout_prob",
    "lora_r": "--lora_rank",
    "use_dora": "--dora",
    "use_rslora": "--rslora",
    "target_modules": "--lora_targets",
    "resume_from_checkpoint": "--resume with --run_dir",
    "save_steps": "--save_every",
    "logging_steps": "--log_every",
    "eval_steps": "--eval_every, which counts epochs",
    "early_stopping_patience": "--patience",
    "local_files_only": "HF_HUB_OFFLINE=1 in the environment",
    "dev_out": "--sst_dev_out, and so on for each task",
    "test_out": "--sst_test_out, and so on for each task",
    "do_train": "what happens without --evaluate",
    "do_eval": "--evaluate CHECKPOINT",
    "do_predict": "--evaluate CHECKPOINT with --predict FILE",
}


def explain_unknown(words: Sequence[str], known: Iterable[str]) -> str:
    """Return what is meant by words that argparse does not know, or nothing; `known` are all flags, such as --lr."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if flags:
        found = filter(None, (meant_by(flag, known) for flag in dict.fromkeys(flags)))
        return "; ".join(found)
    name = words[0]
    recipes = [name] if Path(name).is_file() else close_recipes(name)
    return f"a file of flags has an @ before its name: @{recipes[0]}" if recipes else ""


def meant_by(flag: str, known: Iterable[str]) -> str:
    """Return what may be meant by one unknown flag, or nothing."""
    if (here := FLAGS_ELSEWHERE.get(flag.lstrip("-"))) is not None:
        return f"{flag} is {here} here" if here.startswith("--") else f"{flag} is {here}"
    close = difflib.get_close_matches(flag, list(known), n=3, cutoff=0.75)
    return f"for {flag}, did you mean {' or '.join(close)}?" if close else ""


def close_recipes(name: str) -> list[str]:
    """Return the files of flags beside `name` and in recipes/ whose names are close to it, the closest first."""
    files = {str(path) for path in (*Path(name).parent.glob("*.args"), *Path("recipes").rglob("*.args"))}
    by_stem = {Path(file).stem: file for file in sorted(files)}
    stems = difflib.get_close_matches(Path(name).stem, list(by_stem), n=3, cutoff=0.7)
    return [by_stem[stem] for stem in stems]
