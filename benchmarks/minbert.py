"""This package's side of a comparison, and the one place where the benchmark builds and drives its Trainer."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from base_bert import load_weights
from benchmarks.measure import ignore, say
from benchmarks.options import BenchmarkOptions
from benchmarks.workloads import Workload, load_start, requested_device
from cli.parser import parse
from config import Config
from datasets import TaskData, load_splits, tokenise
from evaluation.predict import predict
from lora import LoRAConfig
from models.multitask_bert import MultitaskBERT
from tasks import TASKS, Task
from text.tokenizer import Tokenizer
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.logger import describe_freezing
from training.run_directory import RunDirectory
from training.task_sampling import Step, TaskBatch, task_batches
from training.trainer import Trainer
from utils.device import Device


class TrainerDriver:
    """A Trainer whose steps the benchmark makes one by one, without `Trainer.fit` and its files."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBERT,
        tokenizer: Tokenizer,
        data: Mapping[str, Mapping[str, TaskData]],
        device: Device,
        say: Callable[[str], None],
        context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        """Build the Trainer; `data` has the splits train and dev by task."""
        self.config, self.model, self.dev, self.device = config, model, data["dev"], device
        run = RunDirectory(Path(os.devnull))  # only Trainer.fit writes
        train, dev = data["train"], data["dev"]
        self.trainer = Trainer.from_config(config, model, tokenizer, train, dev, device, run, context, say)

    def start_epoch(self, epoch: int) -> str:
        """Freeze what does not train in `epoch`, counted from 0, and say in words what trains."""
        layers = self.model.freeze_for_epoch(self.config.train, epoch)
        if self.trainer.data_parallel is not None:
            self.trainer.data_parallel.rebuild()
        self.model.train()
        return describe_freezing(self.model, layers, self.config.train.fine_tune_mode)

    def batches(self, task: str) -> list[np.ndarray]:
        """Return the example numbers [B] of each batch of a task in the first epoch."""
        return [batch.indices for batch in task_batches(self.trainer.plan, 0, task)]

    def train(self, task: str, batches: Sequence[np.ndarray]) -> list[Tensor]:
        """Make an optimizer step for each batch, given by its example numbers [B], and return the losses.

        These are the steps of an epoch for the loader, which prefetches, and for the feature cache, if there is one.
        """
        steps = [Step((TaskBatch(task, indices),)) for indices in batches]
        self.trainer.loader.begin_epoch(steps, done=0, number=0)
        return [self.trainer.train_step(step).batches[0].loss for step in steps]

    def evaluate(self) -> None:
        """Predict the dev sets of all tasks."""
        self.trainer.evaluate(list(self.model.tasks))

    def graphs_report(self) -> str | None:
        """Return what was recorded as CUDA graphs, or None without --cuda_graphs."""
        return None if self.trainer.cuda_graphs is None else self.trainer.cuda_graphs.report()


def driver_from_flags(
    options: BenchmarkOptions, flags: Sequence[str], tasks: Mapping[str, Task], say: Callable[[str], None]
) -> TrainerDriver:
    """Return what trains `tasks` by these flags of multitask_classifier.py on the benchmark's data and device."""
    config = parse([*flags, "--data_dir", options.data_dir], TASKS, "benchmark.py", "")
    device = requested_device(options, say)
    folder, bert_config, tokenizer = load_start(options.pretrained)
    splits = load_splits(config.data, config.tasks, tasks, ["train", "dev"], say)
    data = tokenise(splits, tokenizer, "siamese", False, say)
    model = MultitaskBERT(config.model, bert_config, tasks)
    model.load_backbones(load_weights(folder, bert_config))
    return TrainerDriver(config, model, tokenizer, data, device, ignore)


class MinbertSide:
    """This package, running the code of training and evaluation. With `adapters`, only they and the head train."""

    def __init__(
        self, work: Workload, adapters: LoRAConfig | None = None, context: DistributedContext = SINGLE_PROCESS
    ) -> None:
        name = work.task.name
        self.work, self.model = work, MultitaskBERT(work.config.model, work.bert_config, {name: work.task})
        self.model.backbone(name).load_state_dict(load_weights(work.folder, work.bert_config))
        for module in self.model.heads[name].modules():
            if isinstance(module, nn.Linear):  # a cosine has none
                module.load_state_dict(work.head().state_dict())
        if adapters is not None:
            self.model.add_adapters(adapters)
        data = {"train": {name: work.train}, "dev": {name: work.dev}}
        self.driver = TrainerDriver(work.config, self.model, work.tokenizer, data, work.device, say, context)
        self.driver.start_epoch(0)

    def forward(self, indices: np.ndarray) -> Tensor:
        """Return the outputs [B, classes] or [B] of training examples [B]."""
        return self.model(self.work.task.name, self.work.train.batch(indices).to(self.work.device.device))

    def train_on(self, *batches: np.ndarray) -> None:
        """Make an optimizer step for the examples [B] of each batch."""
        self.driver.train(self.work.task.name, batches)

    def evaluate(self) -> np.ndarray:
        """Return the outputs [N, classes] or [N] of all dev examples."""
        device = self.work.device
        return predict(self.model, self.work.dev, device.device, self.work.config.train.batch_size, device.amp)
