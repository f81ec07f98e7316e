"""Whole runs of the script against a plain one: transformers' BERT on padded batches, torch's optimizers and a loop.

What is tested is the way from the flags to the weights: that each method acts at its place in the step, on the right
parameters and in the right scale, beside the others. Both sides compute in float64: optimizers that divide a gradient
by its own size would make visible differences of fp32's rounding within a few steps.
"""

import csv
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import configure, metrics
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from transformers import BertModel, BertTokenizer

import multitask_classifier
from models.build import build_model
from models.checkpoint import load
from tasks import DEFAULT_TASKS, TASKS
from training.task_sampling import ROUTINES, Plan, Step

FILES = {"sst": "ids-sst-{}.csv", "para": "quora-{}.csv", "sts": "sts-{}.csv"}
LABELS = {"sst": "sentiment", "para": "is_duplicate", "sts": "similarity"}
MULTIPLIERS, DECAYS = {"sst": 4, "para": 5, "sts": 3}, {"sst": 9e-3, "para": 1e-5, "sts": 1e-2}
FLOORS = {"sst": 1 / 5, "para": 1 / 4, "sts": 1 / 4}
OURS_TO_THEIRS = {
    "word_embedding": "embeddings.word_embeddings",
    "pos_embedding": "embeddings.position_embeddings",
    "tk_type_embedding": "embeddings.token_type_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "bert_layers": "encoder.layer",
    "self_attention": "attention.self",
    "attention_dense": "attention.output.dense",
    "attention_layer_norm": "attention.output.LayerNorm",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
    "out_layer_norm": "output.LayerNorm",
    "pooler_dense": "pooler.dense",
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}

Flags = dict[str, Any]
SIAMESE: Flags = {"arch": "v1", "sts_loss": "pearson"}
ONE_RATE: Flags = {f"{task}_lr_multiplier": 2 for task in FILES} | {f"{task}_weight_decay": 0.01 for task in FILES}
CASES: dict[str, Flags] = {
    "R0": {"fine_tune_mode": "iterative", "optim": "Adamax", "lr_schedule": "lambda", "epochs": 5},
    "clip": {
        "optim": "AdamW",
        "lr_schedule": "linear",
        "warmup": 0.3,
        "clip": 0.5,
        "sst_weight": 0.3,
        "micro_batch_size": 3,
    },
    "rounds": {"routine": "interleave", "num_sts_trains": 2, "lr_schedule": "cosine", "optim": "SGD", **SIAMESE},
    "joint": {"routine": "joint", "optim": "AdamW", "lr_schedule": "linear", "warmup": 0.3, "sts_weight": 2},
    "PCGrad": {"routine": "joint", "pcgrad": True, "clip": 0.5, "optim": "Adam", "lr_schedule": "cosine", **SIAMESE},
    "one optimizer": {"optimizers": "one", "optim": "AdamW", "clip": 0.5, **ONE_RATE},
    "EMA": {"average": "ema", "ema_decay": 0.8, "optim": "RAdam", "fine_tune_mode": "iterative", "epochs": 3},
    "DoRA": {"lora_mode": "attn-only", "lora_rank": 2, "lora_alpha": 5, "dora": True, "average": "swa"},
}
FOR_ALL: Flags = {
    "arch": "r1-baseline", "fine_tune_mode": "full-model", "optim": "Adamax", "lr_schedule": "constant", "epochs": 2,
    "lr": 1e-3, "batch_size": 8, "hidden_dropout_prob": 0, "backbone_dropout_prob": 0, "max_length": 64, "threads": 1,
}  # fmt: skip


class HandoutAdamW(torch.optim.Optimizer):
    """eps beside the uncorrected root, and the decay last: unlike torch's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                t = state["t"] = state.get("t", 0) + 1
                m = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * p.grad
                v = state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * p.grad**2
                p -= group["lr"] * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
                p -= group["lr"] * group["weight_decay"] * p


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": HandoutAdamW,
    "Adam": torch.optim.Adam,
    "Adamax": torch.optim.Adamax,
    "RAdam": torch.optim.RAdam,
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}


def rate(flags: Flags, task: str, position: float) -> float:
    """Return the learning rate after `position` epochs."""
    base, done = flags["lr"] * flags.get(f"{task}_lr_multiplier", MULTIPLIERS[task]), position / flags["epochs"]
    return (
        base
        * {
            "constant": 1.0,
            "lambda": 0.5 ** math.floor(position),
            "cosine": FLOORS[task] + (1 - FLOORS[task]) * (1 + math.cos(math.pi * done)) / 2,
            "linear": done / 0.3 if done <= 0.3 else (1 - done) / 0.7,
        }[flags["lr_schedule"]]
    )


def read(path: Path, task: str) -> tuple[list[list[str]], Tensor]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    texts = [[row[name].strip() for name in TASKS[task].text_columns] for row in rows]
    labels = torch.tensor([float(row[LABELS[task]]) for row in rows], dtype=torch.float32)
    return texts, labels.long() if task == "sst" else labels.double()


class PlainModel(nn.Module):
    """The archs r1-baseline, of joined pairs and linear heads, and v1, of compared ones with a cosine for STS."""

    def __init__(self, folder: Path, flags: Flags, start: dict[str, Tensor]) -> None:
        super().__init__()
        self.tokenizer, self.siamese = BertTokenizer(str(folder / "vocab.txt")), flags["arch"] == "v1"
        bert: Any = BertModel.from_pretrained(folder).double().eval()  # without its dropout
        if "dora" in flags:
            wanted = peft.LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["query", "key", "value"])
            bert = peft.get_peft_model(bert, wanted).eval()
        self.bert = bert
        width = 2 * 32 if self.siamese else 32
        self.heads = nn.ModuleDict({"sst": nn.Linear(32, 5), "para": nn.Linear(width, 1)})
        if not self.siamese:
            self.heads["sts"] = nn.Linear(width, 1)
        with torch.no_grad():  # what is drawn at random
            for name, tensor in start.items():
                if name.startswith("heads.") or "lora_" in name:
                    self.named(name).copy_(tensor)

    def named(self, ours: str) -> Tensor:
        """Return the tensor that has this name in the package."""
        part, owner, *rest = ours.split(".")
        if part == "heads":
            return self.heads[owner].get_parameter(rest[-1])
        name = ".".join(OURS_TO_THEIRS.get(word, word) for word in rest)
        if isinstance(self.bert, peft.PeftModel):
            name = f"base_model.model.{name}"
        return self.bert.get_parameter(name)

    def embed(self, *texts: list[str]) -> Tensor:
        batch = self.tokenizer(*texts, padding=True, return_tensors="pt")
        return self.bert(**batch).pooler_output

    def forward(self, task: str, rows: list[list[str]]) -> Tensor:
        columns = [list(column) for column in zip(*rows, strict=True)]
        if task == "sst" or not self.siamese:
            out = self.heads[task](self.embed(*columns))
            return out if task == "sst" else out[:, 0]
        u, v = map(self.embed, columns)
        return 5 * F.cosine_similarity(u, v) if task == "sts" else self.heads[task](torch.cat([u, v], dim=1))[:, 0]

    def loss(self, task: str, rows: list[list[str]], labels: Tensor) -> Tensor:
        out = self(task, rows)
        if task == "sst":
            return F.cross_entropy(out, labels)
        if task == "para":
            return F.binary_cross_entropy_with_logits(out, labels)
        return 1 - torch.corrcoef(torch.stack([out, labels]))[0, 1] if self.siamese else F.mse_loss(out, labels)

    def freeze(self, flags: Flags, epoch: int) -> None:
        """Heads in the first epoch; then the pooler and one layer, one, two of the two; then the embeddings too."""
        if flags["fine_tune_mode"] == "iterative":
            top = [0, 1, 1, 2, 3][epoch]
            for name, p in self.bert.named_parameters():
                words = name.split(".")
                floor = 2 - int(words[2]) if words[0] == "encoder" else 1 if words[0] == "pooler" else 3
                p.requires_grad_(top >= floor)


def projected(gradients: list[dict[str, Tensor]], order: np.random.Generator) -> list[dict[str, Tensor]]:
    """PCGrad's Algorithm 1."""

    def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in a.keys() & b.keys())

    out = []
    for i, gradient in enumerate(gradients):
        for j in order.permutation([other for other in range(len(gradients)) if other != i]):
            other = gradients[j]
            share = min(0.0, product(gradient, other)) / product(other, other)
            gradient = gradient | {name: gradient.get(name, 0.0) - share * value for name, value in other.items()}
        out.append(gradient)
    return out


def plain_run(flags: Flags, model: PlainModel, data: Path, epochs: list[list[Step]]) -> list[dict[str, float]]:
    """Train as the flags say, with these steps of each epoch; return the mean loss of each task in each epoch."""
    examples = {task: read(data / FILES[task].format("train"), task) for task in TASKS if task in FILES}
    shared, one = list(model.bert.parameters()), "joint" in flags.values() or "optimizers" in flags
    heads = {task: list(model.heads[task].parameters()) if task in model.heads else [] for task in FILES}
    if one:
        groups = [{"params": shared, "tasks": tuple(FILES)}] + [{"params": heads[t], "tasks": (t,)} for t in FILES]
        optimizers = dict.fromkeys(FILES, OPTIMIZERS[flags["optim"]](groups, lr=0.0))
    else:
        optimizers = {
            task: OPTIMIZERS[flags["optim"]]([{"params": shared + heads[task], "tasks": (task,)}], lr=0.0)
            for task in FILES
        }
    for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
        decays = [flags.get(f"{task}_weight_decay", DECAYS[task]) for task in group["tasks"]]
        group["weight_decay"] = sum(decays) / len(decays)
    averages, made, losses = [p.detach().clone() for p in model.parameters()], 0, []
    for epoch, steps in enumerate(epochs):
        model.freeze(flags, epoch)
        sums, counts = dict.fromkeys(FILES, 0.0), dict.fromkeys(FILES, 0)
        for number, step in enumerate(steps):
            gradients = []
            for batch in step.batches:
                texts, labels = examples[batch.task]
                loss = model.loss(batch.task, [texts[i] for i in batch.indices], labels[batch.indices])
                loss = flags.get(f"{batch.task}_weight", 1.0) * loss
                sums[batch.task] += loss.item() * len(batch.indices)
                counts[batch.task] += len(batch.indices)
                model.zero_grad()
                (loss / len(step.batches)).backward()
                gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            if flags.get("pcgrad"):
                gradients = projected(gradients, np.random.default_rng([11711, made]))
            for name, p in model.named_parameters():
                parts = [gradient[name] for gradient in gradients if name in gradient]
                p.grad = torch.stack(parts).sum(0) if parts else None
            if "clip" in flags:
                nn.utils.clip_grad_norm_(model.parameters(), flags["clip"])
            optimizer = optimizers[step.batches[0].task]
            for group in optimizer.param_groups:
                rates = [rate(flags, task, epoch + number / len(steps)) for task in group["tasks"]]
                group["lr"] = sum(rates) / len(rates)
            optimizer.step()
            made += 1
            if flags.get("average") == "ema":
                torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1 - flags["ema_decay"])
        losses.append({task: sums[task] / counts[task] for task in FILES})
        if flags.get("average") == "swa":
            torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1 / (epoch + 1))
    if "average" in flags:
        with torch.no_grad():
            for p, average in zip(model.parameters(), averages, strict=True):
                p.copy_(average)
    return losses


@torch.no_grad()
def plain_scores(model: PlainModel, data: Path) -> dict[str, float]:
    out = {}
    for task in FILES:
        texts, labels = read(data / FILES[task].format("dev"), task)
        made = model(task, texts).numpy()
        decided = made.argmax(1) if task == "sst" else made > 0
        out[task] = pearsonr(made, labels).statistic if task == "sts" else accuracy_score(labels, decided)
    return out


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, small_data: Path) -> Iterator[None]:
    """Inside, the package computes in float64; the fixtures named here are made before."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_where_a_plain_one_does(
    in_float64: None, tiny_bert: Path, small_data: Path, tmp_path: Path, case: str
) -> None:
    flags = FOR_ALL | CASES[case]
    paths = {"pretrained": tiny_bert, "data_dir": small_data, "run_dir": tmp_path / "run"}
    words = ["--no_tensorboard", f"--eval_every={flags['epochs']}"]  # so that the last epoch is the best
    words += [f"--{name}" if value is True else f"--{name}={value}" for name, value in (flags | paths).items()]
    config = configure(*words)
    start, _ = build_model(config, DEFAULT_TASKS, print)
    model = PlainModel(tiny_bert, flags, start.state_dict())
    plan = Plan.of(config.train, config.tasks, dict.fromkeys(FILES, 20))
    steps = [ROUTINES[config.train.routine](plan, epoch) for epoch in range(flags["epochs"])]
    losses = plain_run(flags, model, small_data, steps)

    multitask_classifier.main(words)
    for line, wanted in zip(metrics(tmp_path / "run"), losses, strict=True):
        assert {task: figures["loss"] for task, figures in line["train"].items()} == pytest.approx(wanted, abs=1e-7)
    best = load(tmp_path / "run" / "best.pt")
    saved = [p for p in model.parameters() if p.requires_grad or "dora" not in flags]
    assert {id(model.named(name)) for name in best["weights"]} == set(map(id, saved))
    for name, tensor in best["weights"].items():
        if name.endswith("key.bias"):  # adds the same to all scores of a query: its gradient is rounding alone
            continue
        torch.testing.assert_close(tensor, model.named(name).detach().view_as(tensor), atol=1e-7, rtol=0, msg=name)
    scores = {task: best["scores"][task][TASKS[task].metric] for task in FILES}
    wanted = plain_scores(model, small_data)
    assert scores == pytest.approx(wanted, abs=1e-7)
    assert best["scores"]["score"] == pytest.approx((wanted["sst"] + wanted["para"] + (1 + wanted["sts"]) / 2) / 3)
