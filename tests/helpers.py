"""What several test modules use."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from base_bert import save_pretrained
from benchmarks.options import BenchmarkOptions
from bert import BertModel
from cli.parser import parse
from config import BertConfig, Config, ModelOptions
from models.multitask_bert import MultitaskBERT
from reporting.page import ReportItem
from tasks import DEFAULT_TASKS, TASKS, Task
from text.packing import PackedBatch, join_padded_pairs, pack, pack_padded, stack_padded_pairs
from training import commands
from training import trainer as trainer_module
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.loader import LoadedBatch
from training.meters import StepResult
from training.objective import ForwardResult, Objective
from training.task_sampling import ROUTINES, Step, TaskBatch
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def configure(*words: object, tasks: Mapping[str, Task] = TASKS) -> Config:
    """Return the configuration of these flags."""
    return parse([str(word) for word in words], tasks, "multitask_classifier.py", "Test.")


def refusal(run: Callable[..., object], *words: object) -> str:
    """Return the message of the UserError that a call raises. It must be one line."""
    with pytest.raises(UserError) as error:
        run(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def shell(script: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, without network."""
    command = [sys.executable, ROOT / script, *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd)


State = dict[str, Tensor]


def make_trainer(
    flags: list[str],
    run_dir: Path,
    *more: object,
    device: Device | None = None,
    context: DistributedContext = SINGLE_PROCESS,
    double: bool = False,
) -> Trainer:
    """Return the trainer of a command line without TensorBoard and test data; of a float64 model if `double`."""
    config = configure(*flags, "--no_tensorboard", "--no_test_predictions", "--run_dir", run_dir, *more)
    inputs = commands.load_inputs(config, context)
    inputs.device = device or inputs.device
    if double:
        inputs.model.double()
    return commands.make_trainer(config, inputs, context)


def make_ready(flags: list[str], run_dir: Path, *more: object, **options: Any) -> Trainer:
    """Return a trainer for single steps: the first epoch's freezing, by default none, is done."""
    trainer = make_trainer(flags, run_dir, "--fine_tune_mode", "full-model", *more, **options)
    trainer.freeze(0)
    trainer.model.train()
    return trainer


def step_of(task: str, rows: Any) -> Step:
    """Return an optimizer step on one batch: the training examples `rows` of a task."""
    return Step((TaskBatch(task, np.asarray(rows)),))


def steps_of(trainer: Trainer, epoch: int = 0) -> list[Step]:
    """Return the steps of an epoch, counted from 0."""
    return ROUTINES[trainer.config.train.routine](trainer.plan, epoch)


def load_batch(trainer: Trainer, task: str, rows: Any, number: int = 0) -> LoadedBatch:
    """Return the training examples `rows` of a task as batch `number` of the run."""
    return trainer.loader.next(TaskBatch(task, np.asarray(rows)), number)


def forward_result(trainer: Trainer, task: str, rows: Any, number: int = 7) -> ForwardResult:
    """Return a training pass of the examples `rows`, as auxiliary losses get it."""
    model, batch = trainer.model.train(), load_batch(trainer, task, rows, number)
    state = torch.get_rng_state()
    assert isinstance(trainer.objective, Objective)
    embedding = trainer.objective.embed(batch, batch.inputs)
    return ForwardResult(trainer.objective, batch, embedding, model.outputs(task, embedding), state)


def ask_the_allocator() -> None:
    """Raise the CPU allocator's error."""
    torch.empty(1 << 60)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def copied(model: torch.nn.Module) -> State:
    """Return copies of a model's tensors by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: State, after: State) -> set[str]:
    """Return the names of the tensors that differ."""
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def digest(state: State, prefix: str) -> str:
    """Return a hash of the tensors whose names begin with `prefix`."""
    out = hashlib.sha256()
    for name, tensor in state.items():
        if name.startswith(prefix):
            out.update(name.encode() + tensor.numpy().tobytes())
    return out.hexdigest()


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of all numbers in an optimizer's state, parameter by parameter."""
    return [
        torch.as_tensor(value).clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
    ]


def states_by_epoch(flags: list[str], run_dir: Path, *more: object) -> tuple[MultitaskBERT, list[State]]:
    """Train; return the model, and its tensors before training and after each epoch."""
    trainer = make_trainer(flags, run_dir, *more)
    states = [copied(trainer.model)]

    def after_epoch(line: str) -> None:
        if line.startswith("\nEpoch"):
            states.append(copied(trainer.model))

    trainer.say = after_epoch
    trainer.fit()
    return trainer.model, states


class Killed(BaseException):
    """The process ends here, without any warning."""


def kill_at(trainer: Trainer, method: str, epoch: int) -> None:
    """Train, and stop as if killed where the trainer calls its `method` for the first time with `epoch` epochs done."""
    original = getattr(trainer, method)

    def kill_in_time(*arguments: Any) -> Any:
        if trainer.progress.epoch == epoch:
            raise Killed
        return original(*arguments)

    setattr(trainer, method, kill_in_time)
    with pytest.raises(Killed):
        trainer.fit()


def interrupted(trainer: Trainer, epochs: int) -> None:
    """Train, and stop as if killed when so many epochs are done and saved."""
    kill_at(trainer, "train_epoch", epochs)


def assert_resumes(flags: list[str], folder: Path, *more: object, after: int) -> Trainer:
    """Check that a run that is killed after so many epochs ends to the bit as a whole run, and return the latter."""
    whole = make_trainer(flags, folder / "whole", *more)
    whole.fit()
    interrupted(make_trainer(flags, folder / "part", *more), after)
    torch.manual_seed(77)  # another process
    resumed = make_trainer(flags, folder / "part", *more, "--resume")
    resumed.fit()
    assert changed(copied(whole.model), copied(resumed.model)) == set()
    assert (folder / "whole" / "metrics.jsonl").read_bytes() == (folder / "part" / "metrics.jsonl").read_bytes()
    return whole


def set_dev_scores(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let the overall dev scores of a run be these; everything else of an evaluation is as it is."""
    overall, given = trainer_module.overall, iter(scores)
    monkeypatch.setattr(trainer_module, "overall", lambda *arguments: {**overall(*arguments), "score": next(given)})


FILMS = Task(
    name="films",
    title="Film reviews",
    kind="classes",
    label_column="sentiment",
    label_range=(0, 1),
    text_columns=("sentence",),
    files={"train": "films-train.csv", "dev": "films-dev.csv", "test": "films-test-student.csv"},
    prediction_column="Predicted_Sentiment",
    backbone="sentiment",
    losses=("ce",),
    lr_multiplier=2.0,
    weight_decay=1e-3,
    lr_floor=1 / 4,
    aliases=("movies",),
    by_default=False,
)


def write_films(folder: Path, stem: str) -> None:
    """Write sentences with labels 0 and 1 to STEM-train.csv, STEM-dev.csv and STEM-test-student.csv."""
    words = {0: "dreadful and dull", 1: "superb and charming"}
    for split, rows in (("train", 10), ("dev", 6), ("test-student", 4)):
        lines = ["\tid\tsentence\tsentiment" if split != "test-student" else "\tid\tsentence"]
        for i in range(rows):
            label = "" if split == "test-student" else f"\t{i % 2}"
            lines.append(f"{i}\tfilm{i}\tThe film is {words[i % 2]} , number {i} .{label}")
        (folder / f"{stem}-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


TINY = BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def randomise(module: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Draw every parameter from N(0, std^2), but weights of norms from N(1, std^2). So no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            mean = 1.0 if re.search(r"norm\.weight", name, re.IGNORECASE) else 0.0
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return module


def max_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def weighted_sum(x: Tensor, seed: int = 5) -> Tensor:
    """Return a random linear function of a tensor, as a loss whose gradient differs in every element."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * weights.to(x.dtype)).sum()


def model_options(**given: Any) -> ModelOptions:
    """Return options with everything filled in that `arch` decides."""
    return ModelOptions(**given).resolved()


def make_model(
    seed: int = 0, config: BertConfig = TINY, tasks: dict[str, Task] = DEFAULT_TASKS, **given: Any
) -> MultitaskBERT:
    """Return a model without dropout whose every parameter is random."""
    model = MultitaskBERT(model_options(**{"hidden_dropout_prob": 0.0, **given}), config, tasks)
    randomise(model, seed)
    return model


def make_texts(seed: int, size: int = 6, longest: int = 11) -> tuple[Tensor, Tensor]:
    """Return random ids and mask [size, longest]; each text has at least [CLS] and [SEP]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (size,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return torch.randint(3, TINY.vocab_size, mask.shape, generator=generator) * mask, mask


def make_batch(model: MultitaskBERT, task: str, size: int = 6, seed: int = 0) -> PackedBatch:
    """Return a packed batch of `size` examples of a task, joined as the model wants them."""
    first, second = make_texts(seed, size), make_texts(seed + 1000, size, 14)
    if not model.tasks[task].is_pair:
        return pack_padded(*first)
    return (stack_padded_pairs if model.is_siamese(task) else join_padded_pairs)(*first, *second)


def hf_model(class_name: str = "BertModel", config: BertConfig = TINY) -> Any:
    """Return a transformers model in evaluation mode whose every parameter is random."""
    import transformers

    model = getattr(transformers, class_name)(transformers.BertConfig(**config.to_dict()))
    model.tie_weights()
    return randomise(model, std=1.0).eval()


def our_names(bert: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of a transformers BertModel by our names, written down independently of base_bert.py."""
    modules: dict[str, Any] = {
        "word_embedding": bert.embeddings.word_embeddings,
        "pos_embedding": bert.embeddings.position_embeddings,
        "tk_type_embedding": bert.embeddings.token_type_embeddings,
        "embed_layer_norm": bert.embeddings.LayerNorm,
    }
    for n, layer in enumerate(bert.encoder.layer):
        modules |= {
            f"bert_layers.{n}.self_attention.query": layer.attention.self.query,
            f"bert_layers.{n}.self_attention.key": layer.attention.self.key,
            f"bert_layers.{n}.self_attention.value": layer.attention.self.value,
            f"bert_layers.{n}.attention_dense": layer.attention.output.dense,
            f"bert_layers.{n}.attention_layer_norm": layer.attention.output.LayerNorm,
            f"bert_layers.{n}.interm_dense": layer.intermediate.dense,
            f"bert_layers.{n}.out_dense": layer.output.dense,
            f"bert_layers.{n}.out_layer_norm": layer.output.LayerNorm,
        }
    if bert.pooler is not None:
        modules["pooler_dense"] = bert.pooler.dense
    return {f"{name}.{part}": p for name, module in modules.items() for part, p in module.named_parameters()}


def write_weights(folder: Path, state: dict[str, Tensor], config: BertConfig = TINY, legacy: bool = False) -> Path:
    """Write a configuration and these weights, as safetensors or in the legacy format of pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if legacy:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def figure_of(item: ReportItem | str) -> Any:
    """Return an item's figure."""
    assert isinstance(item, ReportItem) and item.figure is not None, item
    return item.figure


def cells_of(item: ReportItem | str) -> list[list[str]]:
    """Return an item's table as text."""
    assert isinstance(item, ReportItem) and item.table is not None, item
    return item.table.cells()


def check_layout(figure: Any) -> None:
    """Check that everything is inside the figure, and that legend and panels are below one another."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if a layout collapses
        figure.draw_without_rendering()
    panels = [axes.get_tightbbox() for axes in figure.axes]
    boxes = [*(legend.get_window_extent() for legend in figure.legends), *panels]
    whole = figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    assert figure.get_figwidth() == 3.3


class Page(HTMLParser):
    """The contents of a page. All its elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(out: Path, stem: str = "report") -> Page:
    """Read the page in `out`. It must need no other file, and its images must be the png files beside it."""
    text = (out / f"{stem}.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    images = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(images) == sorted(path.read_bytes() for path in out.glob("*.png"))
    assert all(image["alt"] for image in page.images)
    return page


def output(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *words: object) -> str:
    """Return what a script's main prints on standard output."""
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def read_json(path: Path) -> Any:
    """Return the content of a json file."""
    return json.loads(path.read_text(encoding="utf-8"))


def predictions_of(folder: Path) -> dict[str, np.ndarray]:
    """Return the labels in the prediction files of a run, by file name."""
    return {
        path.name: np.array([float(row.split(" , ")[1]) for row in path.read_text().splitlines()[1:]])
        for path in sorted((folder / "predictions").iterdir())
    }


def fail(*arguments: object) -> Any:
    """Take the place of a function that must not be called."""
    raise AssertionError("it was called")


SAMPLE = ROOT / "data" / "sample"


HEADERS = {
    "sst": b"\tid\tsentence\tsentiment\n",
    "para": b"\tid\tsentence1\tsentence2\tis_duplicate\n",
    "sts": b"\tid\tsentence1\tsentence2\tsimilarity\n",
}


def cut(folder: Path, train: int, dev: int = 12, test: int = 6) -> Path:
    """Write the first rows of each sample file into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in SAMPLE.glob("*.csv"):
        rows = train if "train" in path.name else dev if "dev" in path.name else test
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[: rows + 1]), encoding="utf-8")
    return folder


def make_bert(folder: Path, seed: int = 0, **shape: int) -> Path:
    """Write a random BERT into `folder`: two layers, 32 wide, whose vocabulary is the words of the sample data."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(SAMPLE.glob("*.csv")))
    words = sorted(set(re.findall(r"[^\W\d_]+|\d|[^\w\s]", text.lower())))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"max_position_embeddings": 64, **shape}
    # A wide initialisation, so that sentences have different embeddings.
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config)
    save_pretrained(folder, config, model.state_dict())
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def ragged_ids(lengths: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Return an array of random ids that are not 0 for each length."""
    return [rng.integers(1, 1000, n) for n in lengths]


def packed(rows: Sequence[np.ndarray], second_start: Sequence[int] | None = None) -> PackedBatch:
    """Return a batch of these sequences."""
    lengths = [len(row) for row in rows]
    return pack(np.concatenate(rows), np.array(lengths), np.array(second_start or lengths))


def assert_same_batch(a: PackedBatch, b: PackedBatch) -> None:
    """Check that two batches have the same numbers, dtypes and groups."""
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    assert a.max_seqlen == b.max_seqlen
    for name in ("padded_rows", "packed_rows"):
        assert torch.equal(getattr(a.grouping, name), getattr(b.grouping, name)), name
    for g, h in zip(a.grouping.groups, b.grouping.groups, strict=True):
        assert (g.first, g.sequences, g.length) == (h.first, h.sequences, h.length)
        assert (g.key_mask is None) == (h.key_mask is None)
        assert g.key_mask is None or torch.equal(g.key_mask, h.key_mask)


def benchmark_options(pretrained: Path, data_dir: Path | str, **others: Any) -> BenchmarkOptions:
    """Return the options of a small benchmark."""
    small: dict[str, Any] = {"batch_size": 8, "steps": 2, "warmup": 1, "threads": 1}
    return BenchmarkOptions(**{**small, "pretrained": str(pretrained), "data_dir": str(data_dir), **others})


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A real file system of `size` bytes, mounted at `folder` for as long as the block lasts."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a failed writer may still hold its file


def fill(folder: Path) -> None:
    """Take all the space that is left."""
    filler = os.open(folder / "filler", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with suppress(OSError):
        while True:
            os.write(filler, b"\0" * 4096)
    os.close(filler)


def first_steps(trainer: Trainer, number: int, per_epoch: int | None = None) -> Iterator[tuple[Step, StepResult]]:
    """Make the first steps of a run, at most `per_epoch` of each epoch, and yield them with their results."""
    progress, options = trainer.progress, trainer.config.train
    while True:
        trainer.freeze(progress.epoch)
        trainer.model.train()
        steps = ROUTINES[options.routine](trainer.plan, progress.epoch)[:per_epoch]
        trainer.loader.begin_epoch(steps, 0, progress.batches)
        for step in steps:
            trainer.optimizers.set_rates(trainer.optimizers.for_step(step), progress.epoch)
            yield step, trainer.train_step(step, measure_norm=True)
            progress.steps += 1
            progress.batches += len(step.batches)
            if progress.steps == number:
                return
        progress.epoch += 1
