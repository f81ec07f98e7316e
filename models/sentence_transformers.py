"""Export a backbone with its pooling as the library sentence-transformers reads it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import safetensors.torch
from torch import Tensor

from utils.files import write_atomically, write_json

PACKAGE = "sentence_transformers.models"
POOLING_FOLDER, DENSE_FOLDER = "1_Pooling", "2_Dense"


def export_sentence_transformers(folder: Path, state: Mapping[str, Tensor], pooling: str, max_length: int) -> None:
    """Add to a Hugging Face folder what makes it a model of sentence-transformers, with the same embeddings as ours.

    `state` has the merged weights by our names. With `pooling` cls, the tanh pooler becomes a dense layer after the
    first token. Raises UserError if a file cannot be written.
    """
    hidden = len(state["pooler_dense.bias"])
    modules = [("", "Transformer"), (POOLING_FOLDER, "Pooling")]
    pooling_values = {
        "word_embedding_dimension": hidden,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
    }
    write_json(folder / POOLING_FOLDER / "config.json", pooling_values)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    if pooling == "cls":
        modules.append((DENSE_FOLDER, "Dense"))
        dense_values = {
            "in_features": hidden,
            "out_features": hidden,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        write_json(folder / DENSE_FOLDER / "config.json", dense_values)
        dense = {f"linear.{name}": state[f"pooler_dense.{name}"].cpu().contiguous() for name in ("weight", "bias")}
        save = partial(safetensors.torch.save_file, dense, metadata={"format": "pt"})
        write_atomically(folder / DENSE_FOLDER / "model.safetensors", save)
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{PACKAGE}.{name}"} for i, (path, name) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)  # last, since it makes the folder such a model
