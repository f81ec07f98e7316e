"""Export one task, with its backbone and its head, as an ONNX model."""

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.padded_attention import keep_padding
from lora import merged
from models.multitask_bert import MultitaskBERT
from utils.errors import UserError
from utils.files import write_atomically

OPSET = 17  # the first with LayerNormalization; onnxruntime knows it since 1.12
INPUTS = "input_ids", "attention_mask", "token_type_ids"
INSTALL = "pip install onnx onnxruntime"


class PaddedTask(nn.Module):
    """One task as a function of padded tensors, three for each text (or for each joined pair).

    `line` is slope and intercept that give a similarity the scale of its labels.
    """

    def __init__(self, model: MultitaskBERT, task: str, line: tuple[float, float] | None) -> None:
        super().__init__()
        self.model, self.task, self.line = model, task, line

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the logits [B, classes] or [B]; for a similarity also the label [B].

        `inputs` are `INPUTS` [B, L] of the first texts and, if the task compares embeddings, of the second texts.
        """
        embedding = torch.cat([self.embed(*inputs[i : i + 3]) for i in range(0, len(inputs), 3)])
        logits = self.model.outputs(self.task, embedding)
        if self.line is None:
            return (logits,)
        slope, intercept = self.line
        return logits, (slope * logits + intercept).clamp(*self.model.tasks[self.task].label_range)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return what `MultitaskBERT.embed` returns for the same sequences: [B, H]."""
        batch, backbone = keep_padding(input_ids, attention_mask, token_type_ids), self.model.backbone(self.task)
        first_only = self.model.pooling(self.task) == "cls"
        hidden = backbone.encode(backbone.embed(batch), batch, first_only, adapters=self.model.adapters(self.task))
        if first_only:
            return backbone.pool(hidden)
        kept = attention_mask[..., None].to(hidden.dtype)
        return (hidden.reshape(*input_ids.shape, -1) * kept).sum(1) / kept.sum(1)


def require_onnx() -> None:
    """Raise UserError if the package onnx is missing, which torch needs to write such a model."""
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--export_onnx: no package {error.name}; {INSTALL}") from error


def export_onnx(path: Path, model: MultitaskBERT, task: str, line: tuple[float, float] | None) -> None:
    """Write a task as an ONNX model for batches of any size and length, with merged adapters inside.

    Raises UserError if the file cannot be written. `require_onnx` must have found the package.
    """
    suffixes = ("", "_b") if model.is_siamese(task) else ("",)
    names = [f"{name}{suffix}" for suffix in suffixes for name in INPUTS]
    outputs = ["logits"] if line is None else ["logits", "similarity"]
    lengths = {f"{name}{suffix}": {0: "batch", 1: f"length{suffix}"} for suffix in suffixes for name in INPUTS}
    example = [torch.ones((2, 5 + i), dtype=torch.int64) for i in range(len(suffixes)) for _ in INPUTS]
    write = partial(
        torch.onnx.export,
        PaddedTask(model, task, line).eval(),
        tuple(example),
        opset_version=OPSET,
        dynamo=False,  # the other exporter needs another package
        input_names=names,
        output_names=outputs,
        dynamic_axes=lengths | {name: {0: "batch"} for name in outputs},
    )
    with merged(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this exporter's age, and of sizes in Python that follow from no input
        write_atomically(path, lambda temporary: write(str(temporary)))
