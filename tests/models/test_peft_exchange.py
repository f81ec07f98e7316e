"""Adapters in peft's format, which peft itself writes and reads: outputs and gradients of whole models."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import TINY, make_model, make_texts, max_difference, randomise, refusal, weighted_sum
from safetensors.torch import load_file, save_file

from base_bert import save_pretrained
from bert import BertModel
from lora import MODES, LoRAConfig, adapter_state_dict, inject, load_adapter_state_dict
from models.peft_exchange import export_peft, import_peft

KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
TARGETS = {  # written down again, so that a wrong name in the source cannot agree with itself
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "attention_dense": "attention.output.dense",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
}


def make_bert() -> BertModel:
    model = BertModel(TINY)
    randomise(model, std=0.1)
    return model


def peft_parameter(model: Any, name: str) -> torch.nn.Parameter:
    """Return peft's parameter of one of our adapter names."""
    _, number, rest = name.split(".", 2)
    path, adapter = rest.rsplit(".", 1)
    suffix = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}[adapter]
    return model.get_parameter(f"base_model.model.encoder.layer.{number}.{TARGETS[path]}.{suffix}.default.weight")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_bert_equals_pefts_after_export(name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    model = make_bert()
    save_pretrained(tmp_path / "base", model.config, model.state_dict())
    config = LoRAConfig("all-lin", rank=3, alpha=5.0, **KINDS[name])
    inject(model.to(dtype), config)
    for adapter in (adapters := adapter_state_dict(model)):
        model.get_parameter(adapter).data.add_(torch.randn(adapters[adapter].shape, dtype=dtype), alpha=0.1)
    export_peft(model, config, tmp_path / "adapter", "base")
    base: Any = transformers.BertModel.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs: Any = peft.PeftModel.from_pretrained(base.to(dtype), str(tmp_path / "adapter"), is_trainable=True)
    embedding = base.embeddings.word_embeddings.weight.requires_grad_(True)

    ids, mask = make_texts(0)
    ours, oracle = model(ids, mask), theirs(ids, mask)
    last = oracle.last_hidden_state * mask[:, :, None]  # ours is zero at padding
    names = list(adapter_state_dict(model))
    assert len(names) == 2 * 6 * (3 if name == "dora" else 2)
    found = torch.autograd.grad(
        weighted_sum(ours["last_hidden_state"]), [model.word_embedding.weight, *map(model.get_parameter, names)]
    )
    wanted = torch.autograd.grad(weighted_sum(last), [embedding, *(peft_parameter(theirs, name) for name in names)])
    outputs = [(ours["last_hidden_state"], last), (ours["pooler_output"], oracle.pooler_output)]
    for a, b in [*outputs, *((a.view_as(b), b) for a, b in zip(found, wanted, strict=True))]:
        assert max_difference(a, b) <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("targets", [["query", "value"], ["attention.output.dense", "intermediate.dense"]])
@pytest.mark.parametrize("name", KINDS)
def test_pefts_adapter_is_imported(name: str, targets: list[str], tmp_path: Path) -> None:
    """Also beside a classifier, which peft saves with it by itself."""
    model = make_bert()
    save_pretrained(tmp_path / "base", model.config, model.state_dict())
    wanted = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS if name == "lora" else None,
        r=3,
        lora_alpha=5,
        lora_dropout=0.25,
        use_dora=name == "dora",
        use_rslora=name == "rslora",
        target_modules=targets,
        init_lora_weights=False,
    )
    of: Any = transformers.BertForSequenceClassification if name == "lora" else transformers.BertModel
    base = of.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs: Any = peft.get_peft_model(base, wanted).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in tensor for tensor in saved) == (name == "lora")

    config, tensors = import_peft(tmp_path / "adapter")
    linears = ("query", "value") if targets[0] == "query" else ("attention_dense", "interm_dense")
    assert config.linears == linears and config.freezes_rest
    assert (config.rank, config.alpha, config.dropout) == (3, 5, 0.25)
    assert (config.dora, config.rslora) == (name == "dora", name == "rslora")
    inject(model, config)
    load_adapter_state_dict(model, tensors)
    ids, mask = make_texts(0)
    with torch.no_grad():
        ours, oracle = model.eval()(ids, mask), getattr(base, "bert", theirs)(ids, mask)
    assert max_difference(ours["last_hidden_state"], oracle.last_hidden_state * mask[:, :, None]) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_export_and_import_are_inverse(mode: str, tmp_path: Path) -> None:
    model, config = make_bert(), LoRAConfig(mode, rank=2, alpha=7.0, dora=True)
    inject(model, config)
    randomise(model)
    export_peft(model, config, tmp_path, "base")
    back, tensors = import_peft(tmp_path)
    assert back.linears == config.linears and back.scaling == config.scaling and back.dora
    assert back.mode == mode.removesuffix("-only") + "-only"
    wanted = adapter_state_dict(model)
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def peft_folder(folder: Path, **changes: Any) -> Path:
    """Write an adapter in peft's format with these changes of its configuration."""
    model, config = make_bert(), LoRAConfig()
    inject(model, config)
    export_peft(model, config, folder, "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "holds 'IA3', but only LORA"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern is {'query': 2}, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not supported"),
        ({"modules_to_save": ["classifier", "pooler"]}, "modules_to_save is ['pooler'], which is not supported"),
        # A checkpoint keeps these as flags, and could not be loaded.
        ({"lora_alpha": 1e300}, "alpha is 1e+300; give a number above 0 and at most 1e+30"),
        ({"lora_dropout": 0.995}, "dropout is 0.995; give a number from 0 to 0.99"),
        ({"r": 2}, "has rank 1, but adapter_config.json says r 2"),
    ],
    ids=str,
)
def test_unsupported_adapters_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(import_peft, peft_folder(tmp_path, **changes))


def test_unreadable_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    message = refusal(import_peft, tmp_path / "nowhere")
    assert "nowhere: cannot be read" in message and "name a folder with adapter_config.json" in message
    path = peft_folder(tmp_path) / "adapter_model.safetensors"
    saved = load_file(path)
    save_file({**saved, "base_model.model.pooler.dense.lora_A.weight": torch.ones(1, 16)}, path)
    assert "pooler.dense.lora_A.weight is an adapter of the pooler" in refusal(import_peft, tmp_path)
    save_file({**saved, "base_model.model.encoder.layer.0.x.lora_A.weight": torch.ones(1, 16)}, path)
    assert "layer.0.x.lora_A.weight is no adapter of query," in refusal(import_peft, tmp_path)
    name = next(iter(saved))
    save_file({**saved, name: saved[name].flatten()}, path)
    assert "is there twice or has 1 dimensions" in refusal(import_peft, tmp_path)
    column = LoRAConfig(dora=True, dora_norm="column")
    message = refusal(export_peft, make_bert(), column, tmp_path, "base")
    assert "dora_norm column; export the merged backbone" in message


@pytest.mark.parametrize("kind", ["IA3", "prefix"])
def test_other_methods_of_peft_are_refused_by_their_names(kind: str, tmp_path: Path) -> None:
    base: Any = transformers.BertModel(transformers.BertConfig(**TINY.to_dict()))
    targets = {"target_modules": ["query"], "feedforward_modules": []}
    prefix = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 3}
    options: Any = peft.IA3Config(**targets) if kind == "IA3" else peft.PrefixTuningConfig(**prefix)
    peft.get_peft_model(base, options).save_pretrained(str(tmp_path))
    message = refusal(import_peft, tmp_path)
    assert {"IA3": "'IA3'", "prefix": "'PREFIX_TUNING'"}[kind] in message and "only LORA" in message


@pytest.mark.parametrize("dora", [False, True])
def test_some_layers_of_a_named_adapter_in_an_old_file(dora: bool, tmp_path: Path) -> None:
    """layers_to_transform, F/NAME/ and adapter_model.bin at once; the other layer's adapters change nothing."""
    model = make_bert()
    save_pretrained(tmp_path / "base", model.config, model.state_dict())
    base: Any = transformers.BertModel.from_pretrained(tmp_path / "base", attn_implementation="eager")
    options = peft.LoraConfig(r=2, target_modules=["query", "dense"], layers_to_transform=[1], use_dora=dora)
    theirs: Any = peft.get_peft_model(base, options, adapter_name="mine").eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    theirs.save_pretrained(str(tmp_path / "F"))
    folder = tmp_path / "F" / "mine"
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    config, tensors = import_peft(tmp_path / "F")
    assert {name.split(".")[1] for name in tensors} == {"1"}
    whole = make_model(pair_encoding="siamese")
    whole.load_backbones(model.state_dict())
    whole.start_from_adapters(config, tensors, "test")
    ids, mask = make_texts(0)
    with torch.no_grad():
        ours, oracle = next(iter(whole.backbones.values())).eval()(ids, mask), theirs(ids, mask)
    assert max_difference(ours["last_hidden_state"], oracle.last_hidden_state * mask[:, :, None]) <= 1e-5
    (tmp_path / "F" / "other").mkdir()
    (tmp_path / "F" / "other" / "adapter_config.json").write_text("{}")
    assert "holds 2 adapters; name one of them" in refusal(import_peft, tmp_path / "F")
