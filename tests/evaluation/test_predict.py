"""Prediction: the same in batches of any size, in the order of the examples, and without a trace in the model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from base_bert import load_weights, read_config
from config import ARCHS, DataOptions, ModelOptions, TaskOptions
from datasets import TaskData, load_splits
from evaluation.predict import predict
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS
from text.tokenizer import load_tokenizer

CPU = torch.device("cpu")


def small_model(bert: Path, sample: Path, arch: str) -> tuple[MultitaskBERT, dict[str, TaskData]]:
    """Return a model in training mode whose BatchNorm statistics are not the initial ones, and dev data for it."""
    config = read_config(bert)
    torch.manual_seed(0)
    model = MultitaskBERT(ModelOptions(arch=arch).resolved(), config, DEFAULT_TASKS)
    model.load_backbones(load_weights(bert, config))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                buffer.normal_(0.0, 0.1)
    options = dict.fromkeys(DEFAULT_TASKS, TaskOptions())
    splits = load_splits(DataOptions(data_dir=str(sample)), options, DEFAULT_TASKS, ["dev"], print)
    tokenizer, encoding = load_tokenizer(bert, 64), str(model.options.pair_encoding)
    return model, {name: TaskData(examples, tokenizer, encoding) for name, examples in splits["dev"].items()}


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "cosine"])
def test_predictions_are_those_of_each_example_alone(tiny_bert: Path, sample: Path, arch: str) -> None:
    """In batches of any size, in the order of the file or of the rows that are asked for."""
    model, data = small_model(tiny_bert, sample, arch)
    rows = np.array([77, 2, 11, 0, 149])
    for task, split in data.items():
        outputs = {size: predict(model, split, CPU, size) for size in (7, 1000)}
        assert outputs[7].shape == ((150, 5) if task == "sst" else (150,)) and outputs[7].dtype == np.float32
        assert np.abs(outputs[7] - outputs[1000]).max() < 1e-5
        assert np.abs(outputs[7] - np.roll(outputs[7], 1, axis=0)).max() > 1e-3  # so a wrong order would show
        assert np.abs(predict(model, split, CPU, 2, rows=rows) - outputs[7][rows]).max() < 1e-5
        model.eval()
        for i in rows:
            with torch.no_grad():
                assert np.abs(model(task, split.batch(np.array([i]))).numpy()[0] - outputs[7][i]).max() < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_prediction_leaves_the_model_as_it_was(tiny_bert: Path, sample: Path, training: bool) -> None:
    model, data = small_model(tiny_bert, sample, "yin-yang")
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    first = predict(model, data["sts"], CPU, 32)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)  # dropout is off
    after = model.state_dict()
    assert list(before) == list(after) and any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert np.array_equal(first, predict(model, data["sts"], CPU, 32))


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_every_arch_predicts_every_task(tiny_bert: Path, sample: Path, arch: str) -> None:
    model, data = small_model(tiny_bert, sample, arch)
    for split in data.values():
        assert np.isfinite(predict(model, split, CPU, 4, rows=np.arange(9))).all()
