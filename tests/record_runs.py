"""Record what small runs compute, so that a refactoring can show that it changed nothing.

    python tests/record_runs.py TREE OUT.json [--only NAME,...]
    python tests/record_runs.py --compare A.json B.json

TREE is a checkout of this repository, whose scripts run one after the other with one thread each. Two records of one
tree on one machine are equal to the bit; another processor may round in another way. Two processes may add in another
order, so their runs record scores and sums of tensors, which are compared with a tolerance.

The runs use the first rows of data/sample, and the first layers and words of all-MiniLM-L6-v2. That model must be in
the cache; one run with `--pretrained all-MiniLM-L6-v2` puts it there.
"""

import argparse
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MINILM = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minbert" / "all-MiniLM-L6-v2"
LAYERS, WORDS = 4, 6000  # what the runs use of it; its vocabulary begins with single characters and frequent words
ROWS = {"train": 28, "dev": 16, "test": 4}  # what they use of each sample file
LIMIT = 300  # seconds after which a run counts as hanging and is stopped
TOLERANCE = 1e-5  # of runs with two processes: relative, and absolute for sums near 0
INFORMATIVE = {"seconds", "error", "plan"}  # parts of a record whose differences do not count
SLOW_IMPORTS = ("torch", "torch._dynamo", "scipy.stats", "sklearn.metrics")  # what every run imports

# {out} is the folder of the run, {runs}/NAME that of another run. Later flags override earlier ones. Most runs evaluate
# after the last epoch alone, so that best.pt holds what all epochs did.
TRAIN = (
    "multitask_classifier.py --data_dir {data} --pretrained {weights} --run_dir {out} --no_tensorboard --eval_every 9 "
    "--epochs 1 --max_train_examples 24 --batch_size 16 --lr 3e-4 --fine_tune_mode full-model --arch baseline "
)
# Rounding must not grow here: Adamax makes whole steps of gradients that are 0 but for rounding, and first tokens of a
# small MiniLM are so alike that a correlation depends on their last digits. These archs take means of all tokens.
TWO_RANKS = f"-m torch.distributed.run --standalone --nproc_per_node 2 {TRAIN} --optim SGD --lr 3e-3 "
ARCHS = ("baseline", "yin-yang", "duality", "r1-baseline", "v1", "v2", "cosine", "r4")
ROUTINES = ("random-epoch", "random", "round-robin", "annealed")  # those that draw; "baseline" is sequential
RUNS = {
    **{arch: f"{TRAIN} --arch {arch}" for arch in ARCHS},
    **{routine: f"{TRAIN} --routine {routine} --steps_per_epoch 3 --epochs 2" for routine in ROUTINES},
    "whole-minilm": TRAIN + "--pretrained all-MiniLM-L6-v2 --fine_tune_mode iterative",
    "interleave": TRAIN + "--routine interleave --epochs 2 --num_sst_trains 2 --para_fraction .5 --sts_from_epoch 2",
    "joint": TRAIN + "--routine joint --sts_weight 2",
    "joint-pcgrad": TRAIN + "--routine joint --pcgrad --epochs 2",
    "lora-attn-only": TRAIN + "--lora_mode attn-only --lora_rank 4",
    "lora-all-lin": TRAIN + "--lora_mode all-lin --lora_rank 4 --lora_dropout .1",
    "dora": TRAIN + "--lora_mode all-lin-only --lora_rank 4 --dora",
    "pal": TRAIN + "--pal pal --pal_size 48",
    "pal-shared-v": TRAIN + "--pal shared-v --pal_size 48",
    "pal-mixed-attention": TRAIN + "--pal mixed --pal_size 48 --pal_low_rank_size 24 --pal_residual attention",
    "smart": TRAIN + "--sst_smart 1 --para_smart 1",
    "bregman": TRAIN + "--sst_bregman 1 --sts_bregman 1",
    "simcse-contrastive": TRAIN + "--sst_embedding_loss simcse --para_embedding_loss contrastive",
    "ranking-cosine": TRAIN + "--para_embedding_loss ranking --sts_embedding_loss cosine --sts_embedding_weight .5",
    "ema": TRAIN + "--average ema --ema_decay .9 --epochs 2",
    "swa": TRAIN + "--average swa --epochs 2",
    "best-of-two": TRAIN + "--eval_every 1 --epochs 2",  # the first epoch has the better score
    "iterative": TRAIN + "--fine_tune_mode iterative --epochs 5",
    "iterative-lora": TRAIN + "--fine_tune_mode iterative --lora_mode attn --lora_rank 4 --epochs 3",
    "cache-last-layer": TRAIN + "--fine_tune_mode last-layer --cache_frozen --epochs 2",
    "cache-iterative": TRAIN + "--fine_tune_mode iterative --cache_frozen --epochs 3",
    "init-refresh": TRAIN + "--arch yin-yang --init_from {runs}/yin-yang/best.pt --refresh_batchnorm",
    "mlm": TRAIN + "--mlm",
    "amp": TRAIN + "--amp",
    "adamw-cosine-clip": TRAIN + "--optim AdamW --lr_schedule cosine --clip .5 --sst_loss bce --sts_loss mse",
    "adam-linear": TRAIN + "--optim Adam --lr_schedule linear --sst_loss kl --sts_loss log-cosh",
    "radam-triangular": TRAIN + "--optim RAdam --decoupled --lr_schedule triangular --sst_loss mixed --sts_loss mixed",
    "sgd-cyclic": TRAIN + "--optim SGD --lr 1e-2 --lr_schedule cyclic --sst_loss ordinal",
    "resume": TRAIN + "--average ema --ema_decay .9 --epochs 2 --save_every 4",  # "ema", stopped and resumed
    "ranks-sequential": TWO_RANKS + "--arch cosine --clf nonlinear --head_batchnorm",
    "ranks-joint-pcgrad": TWO_RANKS + "--arch r4 --backbones shared --routine joint --pcgrad --epochs 2",
    "ensemble": "ensemble.py {runs}/baseline/best.pt {runs}/yin-yang/best.pt --data_dir {data} --run_dir {out} "
    "--cache {out}/cache",
    "evaluate": "multitask_classifier.py --evaluate {runs}/baseline/best.pt --data_dir {data} --run_dir {out}",
    "predict": "multitask_classifier.py --evaluate {runs}/yin-yang/best.pt --predict {data}/sentences --task sst",
    "dry-run": TRAIN + "--dry_run --arch yin-yang --lora_mode attn --routine annealed",
}


def write_inputs(tree: Path, data: Path, weights: Path) -> None:
    """Write the first rows of `tree`'s sample files into `data`, and a smaller MiniLM into `weights`."""
    from safetensors.torch import load_file, save_file

    data.mkdir()
    weights.mkdir()
    for path in (tree / "data" / "sample").glob("*.csv"):
        rows = next(count for split, count in ROWS.items() if split in path.name)
        (data / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[: rows + 1]))
    (data / "sentences").write_text("a fine film\nnobody should see this dull story\n")
    config = json.loads((MINILM / "config.json").read_text()) | {"num_hidden_layers": LAYERS, "vocab_size": WORDS}
    (weights / "config.json").write_text(json.dumps(config))
    (weights / "vocab.txt").write_text("\n".join((MINILM / "vocab.txt").read_text().split("\n")[:WORDS]) + "\n")
    tensors = load_file(MINILM / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:WORDS].clone()
    left_out = re.compile(rf"encoder\.layer\.[{LAYERS}-9]\.")
    save_file({k: tensor for k, tensor in tensors.items() if not left_out.match(k)}, weights / "model.safetensors")


def run_script(tree: Path, arguments: list[str], log: Path) -> None:
    """Do what `python ARGUMENTS` does in the folder `tree`; the output goes to `log` and `log`.errors."""
    for number, name in ((1, str(log)), (2, f"{log}.errors")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(tree)
    sys.path[0] = str(tree)
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    (runpy.run_module if arguments[0] == "-m" else runpy.run_path)(sys.argv[0], run_name="__main__")


def run(tree: Path, arguments: list[str], log: Path, stop_at: Path | None = None) -> int | None:
    """Run a script in a fork, which shares the slow imports. Return its exit code.

    With `stop_at`, end it by SIGTERM once that file exists.
    """
    process = multiprocessing.get_context("fork").Process(target=run_script, args=(tree, arguments, log))
    process.start()
    end = time.monotonic() + LIMIT
    while process.is_alive() and time.monotonic() < end and not (stop_at and stop_at.exists()):
        process.join(0.01)
    process.terminate()
    process.join(60)  # an interrupted run saves its state first
    process.kill()
    process.join()
    return process.exitcode


def read_tensors(checkpoint: Path, exact: bool) -> dict[str, Any]:
    """Return the hash of each tensor in a best.pt and one of them all; without `exact`, the sum of each tensor."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tensors = sorted((content.get("model_state_dict") or content["weights"]).items())
    if not exact:
        return {"sums": {name: float(tensor.double().sum()) for name, tensor in tensors}}
    hashes = {}
    for name, tensor in tensors:
        numbers = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + numbers).hexdigest()
    return {"tensors": hashes, "tensors_sha256": hashlib.sha256(json.dumps(hashes).encode()).hexdigest()}


def record(tree: Path, name: str, runs: Path) -> dict[str, Any]:
    """Return the record of one run: its exit code, what it wrote into its folder, and its seconds."""
    out, log, begin, exact = runs / name, runs / f"{name}.log", time.monotonic(), not name.startswith("ranks-")
    arguments = RUNS[name].format(runs=runs, out=out, data=runs / "data", weights=runs / "weights").split()
    result: dict[str, Any] = {}
    if name == "resume":
        result["stopped_exit_code"] = run(tree, arguments, log, stop_at=out / "resume.pt")
        arguments.append("--resume")
    result["exit_code"] = run(tree, arguments, log)
    errors = Path(f"{log}.errors").read_text() if result["exit_code"] else ""
    result["error"] = "\n".join(re.findall(r".*error: .+", errors, re.IGNORECASE)) or errors[-500:]
    if name in ("predict", "dry-run"):
        result["plan" if name == "dry-run" else "output"] = log.read_text().replace(str(runs), "RUNS")
    if (path := out / "scores.json").exists():
        for task, scores in json.loads(path.read_text())["dev"].items():
            result[f"scores of {task}"] = scores
    if exact:
        files = [*out.glob("metrics.jsonl"), *sorted(out.glob("predictions/*.csv"))]
        result["metrics"] = "".join(path.read_text() for path in out.glob("metrics.jsonl"))
        result["files_sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if (path := out / "best.pt").exists():
        result |= read_tensors(path, exact)
    return result | {"seconds": round(time.monotonic() - begin, 1)}


def record_all(tree: Path, names: list[str]) -> dict[str, Any]:
    """Return a record of each run in `names` and of those whose checkpoints they read.

    A run that asks for a flag, or for a choice of a flag, that `tree` does not have is left out.
    """
    needed = {found for name in names for found in re.findall(r"{runs}/([\w-]+)/", RUNS[name])}
    records = {}
    with tempfile.TemporaryDirectory(prefix="record-runs-") as folder:
        write_inputs(tree, Path(folder, "data"), Path(folder, "weights"))
        for name in (name for name in RUNS if name in needed or name in names):
            result = record(tree, name, Path(folder))
            print(f"{name}: {result['seconds']} s, exit code {result['exit_code']} {result['error']}", flush=True)
            if not re.search("unrecognized arguments|invalid choice", result["error"]):
                records[name] = result
    return records


def alike(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether two values are the same; two floats may differ by a tolerance."""
    floats = isinstance(a, float) and isinstance(b, float)
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) if floats else bool(a == b)


def compare(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Print a line for each run, and up to three differences of each part. Return whether no common run differs."""
    all_same = True
    for name in a | b:
        if name not in a or name not in b:
            print(f"{name}: only in {'A' if name in a else 'B'}")
            continue
        counted, lines = [], []
        for part in a[name] | b[name]:
            x, y = ({"": v} if not isinstance(v, dict) else v for v in (a[name].get(part), b[name].get(part)))
            tolerance = TOLERANCE if name.startswith("ranks-") else 0.0
            differing = [key for key in x | y if not alike(x.get(key), y.get(key), tolerance)]
            if part != "seconds":
                lines += [f"    {part} {key}: {x.get(key)} -> {y.get(key)}" for key in differing[:3]]
            if differing and part not in INFORMATIVE:
                counted.append(f"{part} ({len(differing)})")
        print("\n".join([f"{name}: {'differs in ' + ', '.join(counted) if counted else 'same'}", *lines]))
        all_same = all_same and not counted
    return all_same


def main() -> None:
    """Record or compare, as the command line asks."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("paths", nargs=2, type=Path, metavar="PATH", help="TREE OUT.json, or A.json B.json")
    parser.add_argument("--compare", action="store_true", help="compare two records; exit with 1 if they differ")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(RUNS), help="record these alone (default: all)")
    options = parser.parse_args()
    if options.compare:
        a, b = (json.loads(path.read_text()) for path in options.paths)
        sys.exit(0 if compare(a, b) else 1)
    names, begin = options.only.split(","), time.monotonic()
    if unknown := set(names) - set(RUNS):
        parser.error(f"--only {', '.join(unknown)}: there is no such run; choose from {', '.join(RUNS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    for module in SLOW_IMPORTS:
        importlib.import_module(module)
    records = record_all(options.paths[0].resolve(), names)
    options.paths[1].write_text(json.dumps(records, indent=1) + "\n")
    print(f"{len(records)} runs in {time.monotonic() - begin:.0f} s, {sum(os.times()[:4]):.0f} s of CPU")


if __name__ == "__main__":
    main()
