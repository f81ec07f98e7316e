"""Freezing: which parameters of a backbone train, by the unfreezing schedule and by the policy of its adapters.

The number `trainable_layers` counts from the output. 0 means that only the heads train. N means the top N layers and
the pooler. One more than the backbone has layers means everything, since the embeddings count as the lowest layer.
"""

import math
import re

from torch import nn

from bert import BertModel
from lora import LoRAConfig, adapted_layers, adapter_state_dict
from utils.errors import UserError


def scheduled_layers(fine_tune_mode: str, stage: int, depth: int) -> int:
    """Return `trainable_layers` for one `stage` (from 0; see TrainOptions.stage) of backbones with `depth` layers.

    The mode `iterative` trains the heads only, then the top quarter, half and three quarters of the layers, then
    everything (R0, B.2).
    """
    if fine_tune_mode == "last-layer":
        return 0
    if fine_tune_mode == "full-model" or stage >= 4:
        return depth + 1
    return math.ceil(depth * stage / 4)


def parse_command(command: str, depth: int) -> int:
    """Return `trainable_layers` for R0's command `freezeall`, `unfreezeall` or `unfreezetopN` (R0, appendix B).

    Raises UserError for any other text and for an N above `depth`.
    """
    match = re.fullmatch(r"freezeall|unfreezeall|unfreezetop(\d+)", command)
    if match is None or int(match[1] or 0) > depth:
        raise UserError(
            f"unfreezing command {command!r} is none of freezeall, unfreezeall, unfreezetopN with N at most {depth}"
        )
    if match[1]:
        return int(match[1])
    return 0 if command == "freezeall" else depth + 1


def set_trainable(
    backbone: BertModel, trainable_layers: int, adapters: LoRAConfig | None = None, adapters_always: bool = False
) -> None:
    """Set `requires_grad` of every parameter of a backbone: what the schedule AND the adapters' policy let train.

    Adapters train with their layer (R0, iterative unfreezing). With `adapters_always` they train whatever the number of
    layers (R1, section 4.2: the last-layer mode trains adapters and heads).
    """
    depth = len(backbone.bert_layers)
    backbone.requires_grad_(trainable_layers > depth)
    if 0 < trainable_layers <= depth:
        backbone.pooler_dense.requires_grad_(True)
        backbone.bert_layers[depth - trainable_layers :].requires_grad_(True)
    if adapters is None:
        return
    frozen, adapter_names = frozen_by_adapters(backbone, adapters), adapter_state_dict(backbone).keys()
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
        elif adapters_always and name in adapter_names:
            parameter.requires_grad_(True)


def frozen_by_adapters(backbone: nn.Module, adapters: LoRAConfig) -> set[str]:
    """Return the names of the parameters that adapters never let train.

    These are the weight and bias of each wrapped layer and, in the modes `-only`, everything except the adapters.
    """
    if adapters.freezes_rest:
        adapter_names = adapter_state_dict(backbone).keys()
        return {name for name, _ in backbone.named_parameters() if name not in adapter_names}
    return {
        f"{layer_name}.{name}"
        for layer_name, layer in adapted_layers(backbone)
        for name, _ in layer.named_parameters()
        if name not in layer.adapters
    }
