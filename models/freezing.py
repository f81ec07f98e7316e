"""Freezing: which layers of a backbone train."""

import math
import re

from bert import BertModel
from utils.errors import UserError


def set_trainable(backbone: BertModel, structure: str) -> None:
    """Apply one freezing command to one backbone; see MultitaskBERT.manage_freezing.

    Raises UserError for an unknown command or for more layers than there are.
    """
    depth = len(backbone.bert_layers)
    match = re.fullmatch(r"freezeall|unfreezeall|unfreezetop(\d+)", structure)
    if match is None or int(match[1] or 0) > depth:
        raise UserError(
            f"unfreezing command {structure!r} is none of freezeall, unfreezeall, unfreezetopN with N at most {depth}"
        )
    backbone.requires_grad_(structure == "unfreezeall")
    if match[1]:
        backbone.pooler_dense.requires_grad_(True)
        for layer in backbone.bert_layers[depth - int(match[1]) :]:
            layer.requires_grad_(True)


def layers_left_frozen(structure: str, depth: int) -> int:
    """How many of the lowest of `depth` layers a freezing command leaves frozen."""
    if structure == "freezeall":
        return depth
    return 0 if structure == "unfreezeall" else depth - int(structure.removeprefix("unfreezetop"))


def freezing_command(fine_tune_mode: str, stage: int, depth: int) -> str:
    """What trains in a `stage` (counted from 0; see TrainOptions.stage) of backbones with `depth` layers.

    iterative (R0, B.2): heads only, then the top quarter, half and three quarters of the layers, then everything.
    """
    if fine_tune_mode == "last-layer":
        return "freezeall"
    if fine_tune_mode == "full-model" or stage >= 4:
        return "unfreezeall"
    return "freezeall" if stage == 0 else f"unfreezetop{math.ceil(depth * stage / 4)}"
