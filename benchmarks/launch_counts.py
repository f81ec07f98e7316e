"""Counts what a training step starts on a GPU (`make gpu-counts`).

The host needs more time to start a kernel than a GPU needs to run one for short texts, so a step is as fast as its
launches are few. Counting needs no clock and no GPU: tests/simulated_gpu.py stands in for one. A count does not depend
on the width of the model or on the number of examples, so both are small here. What --compile generates is counted in
the code that torch's compiler writes for a CPU.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.options import GENERATED, BenchmarkOptions
from benchmarks.peers import NO_RUN, start_epoch
from benchmarks.workloads import draw_lengths, ignore, prepared_data, write_random_bert
from bert import BertLayer, half_linear
from cli.parser import parse
from config import BertConfig
from kernels.compiled import CompiledFunction
from tasks import PARA, TASKS
from text.packing import PackedBatch, pack, pad_to_bucket
from training.commands import load_inputs
from training.cuda_graphs import USES
from training.distributed import SINGLE_PROCESS
from training.task_sampling import Step, TaskBatch
from training.trainer import Trainer
from utils.console import say

BASE, MINILM = 12, 6  # layers
SIZE = 8  # examples of a batch
WITHOUT_KERNELS = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "record_stream", "resize_"}
FLASH_ROWS = 128  # queries of a block of FlashAttention
COMMON = ["--arch", "v1", "--fine_tune_mode", "full-model", "--optim", "AdamW", "--batch_size", str(SIZE)]
CALLS = r"\bcpp_fused\w*\(|\bextern_kernels\.\w+\(|\b(?:torch\.ops\.)?aten\.\w+[\w.]*\("  # in generated code
SHAPES_OF = 300  # batches


@dataclass(frozen=True)
class Case:
    """A training step: the depth of its model, its flags, and its tasks, which are several in a joint step."""

    layers: int
    flags: list[str]
    tasks: tuple[str, ...] = ("para",)


JOINT = ["--routine", "joint", "--amp"]
CASES = {
    "BERT-base": Case(BASE, ["--amp"]),
    "MiniLM": Case(MINILM, ["--amp"]),
    "BERT-base, compiled": Case(BASE, ["--amp", "--compile"]),
    "MiniLM, compiled": Case(MINILM, ["--amp", "--compile"]),
    "MiniLM, fp32": Case(MINILM, []),
    "MiniLM, fp32, SMART": Case(MINILM, ["--para_smart", "1"]),
    "MiniLM, LoRA": Case(MINILM, ["--amp", "--lora_mode", "all-lin-only", "--lora_rank", "8"]),
    "MiniLM, DoRA": Case(MINILM, ["--amp", "--lora_mode", "all-lin-only", "--lora_rank", "8", "--dora"]),
    "MiniLM, joint": Case(MINILM, JOINT, ("sst", "para", "sts")),
    "MiniLM, joint, PCGrad": Case(MINILM, [*JOINT, "--pcgrad"], ("sst", "para", "sts")),
    "MiniLM, joint, graphs": Case(MINILM, [*JOINT, "--cuda_graphs"], ("sst", "para", "sts")),
    "MiniLM, joint, PCGrad, graphs": Case(MINILM, [*JOINT, "--pcgrad", "--cuda_graphs"], ("sst", "para", "sts")),
}


class LaunchCounter(TorchDispatchMode):
    """Counts by name the operators that start a kernel on another device than the CPU; a "cast" changes the type."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run while this counts."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        on_cpu = all(not isinstance(x, Tensor) or x.device.type == "cpu" for x in tree_leaves((args, kwargs, out)))
        if not (on_cpu or func.is_view or name in WITHOUT_KERNELS):
            self.counts["cast" if name == "_to_copy" and args[0].device == out.device else name] += 1
        return out


def launches(function: Callable[[], object]) -> Counter[str]:
    """Return the operators that `function` starts on another device than the CPU, each with its number."""
    with LaunchCounter() as counter:
        function()
    return counter.counts


def uncounted(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
    """Return the function of a graph that a compiler gets, computed by torch's operators, which are not counted."""

    def run(*arguments: Tensor) -> Any:
        with _disable_current_modes():
            return graph(*arguments)

    return make_boxed_func(run)


@cache
def compiled_kernels() -> int:
    """Return how many kernels and library calls torch's compiler makes of what a layer does after attention.

    Both passes are counted, in bf16 and with dropout. The compiler works for a CPU, which needs no GPU.
    """
    layer = BertLayer(BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=128)).train()
    dense = [linear.parts() for linear in (layer.attention_dense, layer.interm_dense, layer.out_dense)]
    half = half_linear(torch.bfloat16, [[parts] for parts in dense if parts is not None])
    hidden, context = torch.randn(2, 40, 64, requires_grad=True)
    codes, run = [], CompiledFxGraph.__call__

    def noted(graph: CompiledFxGraph, inputs: Any) -> Any:
        codes.append(graph.source_code)
        return run(graph, inputs)

    with patch.object(CompiledFxGraph, "__call__", noted), torch.autocast("cpu", torch.bfloat16):
        compiled = CompiledFunction(BertLayer.after_attention)
        compiled(layer, hidden, context.to(torch.bfloat16), half, None, None).sum().backward()
    assert compiled.compiled is not None, "torch cannot compile here"
    return sum(len(re.findall(CALLS, code[code.index("def call(") :])) for code in codes)


def make_case_trainer(case: Case, folder: Path) -> Trainer:
    """Return a trainer with a narrow model of the case's depth and as much generated data as the steps need."""
    shape = BertConfig(
        vocab_size=500, hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=case.layers
    )
    write_random_bert(folder, shape)
    amp = "--amp" in case.flags
    options = BenchmarkOptions(
        pretrained=str(folder), data_dir=GENERATED, batch_size=SIZE, steps=1, warmup=0, use_gpu=True, amp=amp
    )
    tasks = {name: TASKS[name] for name in case.tasks}
    with prepared_data(options) as prepared:
        flags = [*COMMON, *case.flags, "--use_gpu", *(f"--train_{name}" for name in tasks)]
        flags += ["--pretrained", str(folder), "--data_dir", prepared.data_dir, "--no_test_predictions"]
        config = parse(flags, TASKS, "", "")
        inputs = load_inputs(config, SINGLE_PROCESS)
        train, dev = inputs.data["train"], inputs.data["dev"]
        trainer = Trainer.from_config(
            config, inputs.model, inputs.tokenizer, train, dev, inputs.device, NO_RUN, say=ignore
        )
    start_epoch(trainer, 0)
    return trainer


def step_launches(case: Case) -> tuple[Counter[str], Counter[str]]:
    """Return the launches of a step: all of them, and those outside of the passes forward and backward."""
    compiler = aot_autograd(fw_compiler=uncounted, bw_compiler=uncounted)
    with tempfile.TemporaryDirectory() as folder, patch("torch.compile", partial(torch.compile, backend=compiler)):
        trainer = make_case_trainer(case, Path(folder))
    step = Step(tuple(TaskBatch(name, np.arange(SIZE)) for name in case.tasks))
    for _ in range(1 if trainer.cuda_graphs is None else USES):  # until graphs are captured
        trainer.train_step(step)
    in_passes, compute = LaunchCounter(), trainer.forward_backward

    def forward_backward(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with in_passes:
            return compute(*args, **options)

    trainer.forward_backward = forward_backward  # type: ignore[method-assign]
    everything = launches(lambda: trainer.train_step(step))
    outside = everything - in_passes.counts
    if "--compile" in case.flags:
        everything["generated"] = case.layers * compiled_kernels()
    return everything, outside


def flash_blocks(batch: PackedBatch) -> int:
    """Return the blocks that FlashAttention starts for one head and layer."""
    return -(-batch.max_seqlen // FLASH_ROWS) * batch.num_sequences


def graph_batch(size: int, seed: int) -> PackedBatch:
    """Return a batch of `size` Quora pairs with the lengths of real ones, as --cuda_graphs pads it."""
    lengths = draw_lengths(PARA, size, seed).flatten()
    return pad_to_bucket(pack(np.zeros(lengths.sum(), dtype=np.int64), lengths, lengths))


def graph_shapes(size: int) -> tuple[float, int]:
    """Return how many times the blocks that the texts need are started in such batches, and their distinct shapes."""
    batches = [graph_batch(size, seed) for seed in range(SHAPES_OF)]
    needed = sum(-(-lengths // FLASH_ROWS) for batch in batches for lengths in batch.sizes)
    shapes = {(batch.num_tokens, batch.num_sequences, batch.max_seqlen) for batch in batches}
    return float(sum(map(flash_blocks, batches)) / needed), len(shapes)


def print_counts(cases: Mapping[str, Case]) -> None:
    """Print the launches of each case, and what the padding for CUDA graphs costs."""
    say(f"{'launches of a training step':32} {'all':>6} {'casts':>6} {'outside of the passes':>22}")
    for name, case in cases.items():
        everything, outside = step_launches(case)
        say(f"{name:32} {everything.total():6,} {everything['cast']:6,} {outside.total():22,}")
    say(f"\n{'padded batches of Quora pairs':32} {'blocks of FlashAttention':>26} {'shapes':>8}")
    for size in (64, 256, 512):
        ratio, shapes = graph_shapes(size)
        say(f"{size:32} {ratio:18.2f} x needed {shapes:8}")


if __name__ == "__main__":
    print_counts(CASES)
