"""Files made to do harm: pickles that would run code, claims of endless size, and adapters that belong elsewhere."""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_bert
from test_cache import fail
from test_training import copied, make_trainer

import ensemble
import multitask_classifier
from base_bert import load_weights, read_config
from config import BertConfig, Config
from evaluation.members import find_members, read_outputs
from models.checkpoint import load, load_model, save
from models.multitask_bert import MultitaskBERT
from models.peft_exchange import import_peft
from tasks import TASKS
from text.token_cache import cached
from text.tokenizer import MAX_BYTES, Tokenizer, load_tokenizer
from training.trainer import Trainer
from utils.errors import UserError
from utils.untrusted import MAX_JSON, read_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with a finished run of adapters, and these as peft has them in its folder `peft/sentiment`."""
    folder = tmp_path_factory.mktemp("adapters")
    flags = ["--lora_mode", "attn-only", "--lora_rank", 2, "--epochs", 1, "--fine_tune_mode", "full-model"]
    make_trainer(tiny_flags, folder / "run", *flags).fit()
    words = ["--evaluate", folder / "run" / "best.pt", "--export_peft", folder / "peft"]
    multitask_classifier.main([str(word) for word in words])
    return folder


def refused(what: Callable[[], object], *words: str) -> str:
    """The one line with which something is refused, which has these words."""
    with pytest.raises(UserError) as error:
        what()
    message = str(error.value)
    assert "\n" not in message and len(message) < 2000, message
    assert all(word in message for word in words), message
    return message


# ---------------------------------------------------------------------------------------- pickles that would run code


class Call:
    """A pickle that calls `function(*given)` when it is loaded by a loader that trusts it."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.pair = function, given

    def __reduce__(self) -> Any:
        return self.pair


class State:
    """The same by __setstate__, which gets the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: Any) -> None:
        Path(state["path"]).touch()


def by_opcodes(module: str, name: str, argument: str) -> bytes:
    """A pickle that imports module.name and calls it with a text, written opcode by opcode."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(argument)) + (
        argument.encode() + b"\x85R."
    )  # fmt: skip


def hostile_pickles(trap: Path) -> dict[str, bytes]:
    """Pickles that make the file `trap` when they are run, by name."""
    touch, code = f"touch {trap}", f"open({str(trap)!r}, 'w')"
    nested, saved = pickle.dumps(Call(os.system, touch)), io.BytesIO()
    torch.save(Call(os.system, touch), saved, _use_new_zipfile_serialization=False)
    objects = {
        "os.system": Call(os.system, touch),
        "subprocess": Call(subprocess.check_call, ["touch", str(trap)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(trap), "w"),
        "Path.touch": Call(Path.touch, trap),
        "getattr": Call(getattr(Path, "write_text"), trap, "x"),  # noqa: B009
        "setstate": State(trap),
        "pickle in a pickle": Call(pickle.loads, nested),
        "storage of a pickle": Call(torch.storage._load_from_bytes, saved.getvalue()),
    }
    made = {f"{name}, protocol {p}": pickle.dumps(own, p) for name, own in objects.items() for p in (2, 4)}
    for module, name in (("posix", "system"), ("os", "system"), ("builtins", "eval"), ("__builtin__", "eval")):
        made[f"opcodes {module}.{name}"] = by_opcodes(module, name, code if name == "eval" else touch)
    return made


def in_zip(payload: bytes, path: Path) -> None:
    """A torch.save file whose pickle is `payload`."""
    torch.save({"format": 1, "x": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as out:
        for name, content in members.items():
            out.writestr(name, payload if name.endswith("data.pkl") else content)


def in_npy(payload: bytes) -> bytes:
    """An array of objects as numpy would have pickled it."""
    out = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + payload


def in_npz(payload: bytes, path: Path) -> None:
    """An archive of arrays, all of them of objects; the list of names is one of them."""
    with zipfile.ZipFile(path, "w") as out:
        for name in ("names.npy", "x.npy", "dev/sst.npy"):
            out.writestr(name, in_npy(payload))


def test_no_file_runs_code(trained: Trainer, tmp_path: Path, tiny_bert: Path, small_data: Path, capsys: Any) -> None:
    """Every payload in every file that is read: raw, as torch's zip, as torch's old format and as numpy's arrays."""
    trap, bert = tmp_path / "trap", tmp_path / "bert"
    shutil.copytree(tiny_bert, bert)
    (bert / "model.safetensors").unlink()
    config, path = read_config(bert), tmp_path / "best.pt"
    arrays = tmp_path / "cache" / "kind-kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk.npz"
    count = 0

    def attempts(payload: bytes) -> Iterator[Callable[[], object]]:
        for wrap in ("raw", "zip"):
            write = (lambda file: file.write_bytes(payload)) if wrap == "raw" else (lambda file: in_zip(payload, file))
            write(path)
            yield lambda: load(path)
            yield lambda: load(path, mmap=True)
            yield lambda: load_model(path)
            yield lambda: find_members([str(path)])
            write(bert / "pytorch_model.bin")
            yield lambda: load_weights(bert, config)
            for name in ("tokenizer.json", "vocab.txt"):
                shutil.copyfile(tiny_bert / "vocab.txt", bert / "vocab.txt")
                write(bert / name)
                yield lambda: load_tokenizer(bert, 8)
                (bert / "tokenizer.json").unlink(missing_ok=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (bert / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
                write(bert / name)
                yield lambda: import_peft(bert)
            write(bert / "config.json")
            yield lambda: read_config(bert)

    for name, payload in hostile_pickles(trap).items():
        for attempt in attempts(payload):
            refused(attempt)
            count += 1
            assert not trap.exists(), name
        outputs = tmp_path / "outputs.npz"
        in_npz(payload, outputs)
        assert read_outputs(outputs) is None
        outputs.write_bytes(in_npy(payload))
        assert read_outputs(outputs) is None
        count += 2
        assert not trap.exists(), name
        try:  # the trap works where pickles are trusted, so it is the loaders that kept it shut
            pickle.loads(payload)
        finally:
            assert trap.exists(), name
            trap.unlink()
    print(f"hostile pickles: {count} loads of {len(hostile_pickles(trap))} payloads")
    assert count > 400 and not arrays.exists()


def test_kept_rows_and_token_ids_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made again in the place of the hostile ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trap, arrays = tmp_path / "trap", {"x": np.arange(3)}
    for kind in ("examples", "tokens"):
        for number, payload in enumerate(hostile_pickles(trap).values()):
            key = f"{number:064d}"
            cached(kind, key, lambda: arrays)
            path = tmp_path / "minbert" / "arrays" / f"{kind}-{key[:32]}.npz"
            for write in (lambda path, p=payload: in_npz(p, path), lambda path, p=payload: path.write_bytes(in_npy(p))):
                write(path)
                assert cached(kind, key, lambda: arrays) is arrays
                assert not trap.exists()
            assert cached(kind, key, fail)["x"].tolist() == [0, 1, 2]


def test_a_hostile_state_to_go_on_from(trained: Trainer, tiny_flags: list[str], tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for number, payload in enumerate(hostile_pickles(trap).values()):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        shutil.copyfile(trained.run.path / "config.json", run / "config.json")
        for write in (lambda file, p=payload: file.write_bytes(p), lambda file, p=payload: in_zip(p, file)):
            write(run / "resume.pt")
            trainer = make_trainer(tiny_flags, run, "--epochs", 1, "--resume")
            before = copied(trainer.model)
            refused(trainer.fit, "resume.pt")
            assert all(torch.equal(own, before[name]) for name, own in copied(trainer.model).items())
        assert not trap.exists()
        shutil.rmtree(run)


def test_every_loader_says_so() -> None:
    """No call in the package reads a pickle with trust."""
    sources = [path for folder in (ROOT, ROOT / "training") for path in folder.glob("*.py")]
    assert len(sources) > 30
    found = 0
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "joblib" not in text and "add_safe_globals" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                named = {own.arg: ast.unparse(own.value) for own in node.keywords}
                owner = ast.unparse(node.func.value)
                if owner in ("torch", "np"):
                    key, wanted = ("weights_only", "True") if owner == "torch" else ("allow_pickle", "False")
                    assert named.get(key) == wanted, f"{path}:{node.lineno}"
                    found += 1
    assert found == 4


# -------------------------------------------------------------------------------------------------- claims without end


def safetensors_file(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, which may claim another length than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], first: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def hostile_safetensors() -> dict[str, bytes]:
    """Files that are no safetensors, though they begin like them."""
    one, deep = tensor([1], 0, 4), b"[" * 500_000
    return {
        "header of 2^60 bytes": safetensors_file({"x": one}, b"0000", 1 << 60),
        "header of 2^64-1 bytes": safetensors_file({"x": one}, b"0000", (1 << 64) - 1),
        "header of 2^63 bytes": safetensors_file({"x": one}, b"0000", 1 << 63),
        "header longer than the file": safetensors_file({"x": one}, b"0000", 4096),
        "header of 0 bytes": safetensors_file(b""),
        "shape larger than the bytes": safetensors_file({"x": tensor([1000, 1000], 0, 4)}, b"0000"),
        "shape smaller than the bytes": safetensors_file({"x": tensor([1], 0, 400)}, b"0" * 400),
        "shape of 2^60": safetensors_file({"x": tensor([1 << 60], 0, 4)}, b"0000"),
        "shape that overflows": safetensors_file({"x": tensor([1 << 32, 1 << 32, 4], 0, 4)}, b"0000"),
        "negative shape": safetensors_file({"x": tensor([-1], 0, 4)}, b"0000"),
        "end before begin": safetensors_file({"x": tensor([1], 4, 0)}, b"0000"),
        "end beyond the file": safetensors_file({"x": tensor([1 << 20], 0, 4 << 20)}, b"0000"),
        "overlap": safetensors_file({"x": one, "y": one}, b"0000"),
        "a gap": safetensors_file({"x": one, "y": tensor([1], 8, 12)}, b"0" * 12),
        "bytes left over": safetensors_file({"x": one}, b"0" * 99),
        "unknown type": safetensors_file({"x": tensor([1], 0, 4, "O")}, b"0000"),
        "no object": safetensors_file(b"[1, 2]"),
        "no JSON": safetensors_file(b"{x: 1}"),
        "not UTF-8": safetensors_file(b'{"\xff": 1}'),
        "nested without end": safetensors_file(deep),
        "nested metadata": safetensors_file(b'{"__metadata__": {"a":' + deep),
        "an endless shape": safetensors_file(b'{"x": {"dtype": "F32", "shape": [' + b"1," * 1_000_000),
        "ten thousand tensors": safetensors_file(
            ("{" + ",".join(f'"{i}": {{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10_000)) + "}")
            .encode()
        ),
    }  # fmt: skip


def sparse(path: Path, size: int, begin: bytes = b"") -> None:
    """A file of that size, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


def hostile_json() -> dict[str, bytes]:
    """What a json file may not be."""
    return {
        "nested lists": b"[" * 1_000_000,
        "nested lists that close": b"[" * 100_000 + b"]" * 100_000,
        "nested objects": b'{"a":' * 200_000,
        "nested value": b'{"hidden_size":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a number of a million digits": b'{"hidden_size": 1' + b"0" * 1_000_000 + b"}",
        "a list": b"[]",
        "null": b"null",
        "a text": b'"hidden_size"',
        "infinite": b'{"layer_norm_eps": Infinity}',
        "no number": b'{"layer_norm_eps": NaN}',
        "beyond a float": b'{"layer_norm_eps": 1e999}',
        "a huge vocabulary": b'{"vocab_size": 1099511627776}',
        "a large vocabulary": b'{"vocab_size": 16777216, "hidden_size": 65536, "num_attention_heads": 64}',
        "a billion layers": b'{"num_hidden_layers": 1000000000}',
        "a thousand wide layers": b'{"num_hidden_layers": 1000, "hidden_size": 98304, "intermediate_size": 16777216}',
        "half a layer": b'{"num_hidden_layers": 1.5}',
        "a padding beyond the vocabulary": b'{"vocab_size": 5, "pad_token_id": 5}',
        "more than is read": b" " * (MAX_JSON + 1),
        "UTF-16": '{"hidden_size": 32}'.encode("utf-16"),
        "not UTF-8": b'{"\xff": 1}',
    }


BOUNDED = """
import json, resource, sys
sys.path[:0] = sys.argv[1:3]
import conftest, test_hostile
from pathlib import Path
report = test_hostile.read_all(Path(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
print(json.dumps(report))
"""


def read_all(folder: Path, checkpoint: Path, bert: Path) -> dict[str, Any]:
    """Read every oversized file under a limit of memory; how many there were, and by how much memory rose."""
    import resource
    import time

    load_model(checkpoint)  # code and buffers are there now
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), resource.RLIM_INFINITY))
    before, count, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, (0.0, "")
    for name, path, read in oversized(folder, checkpoint, bert):
        started = time.perf_counter()
        try:
            message = refused(read)
        except BaseException as error:
            raise AssertionError(name) from error
        assert str(path) in message or str(path.parent) in message, (name, message)
        slowest = max(slowest, (time.perf_counter() - started, name))
        count += 1
    risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"count": count, "risen": risen, "slowest": slowest}


def oversized(folder: Path, checkpoint: Path, bert: Path) -> Iterator[tuple[str, Path, Callable[[], object]]]:
    """Files that claim or are too much: name, path, and how they are read."""
    config, copy = read_config(bert), folder / "bert"
    shutil.copytree(bert, copy)

    def build() -> object:
        flags = ["--pretrained", str(copy), "--train_sst", "--max_length", "8"]
        from cli.parser import parse

        return multitask_classifier.build_model(parse(flags, TASKS, "test", "Test."), {"sst": TASKS["sst"]})

    path = copy / "model.safetensors"
    for name, content in hostile_safetensors().items():
        path.write_bytes(content)
        yield f"weights: {name}", path, lambda: load_weights(copy, config)
    sparse(path, 10 << 30)
    yield "weights of 10 GB of zeros", path, lambda: load_weights(copy, config)
    path.unlink()
    path = copy / "pytorch_model.bin"
    sparse(path, 10 << 30)
    yield "a pickle of 10 GB of zeros", path, lambda: load_weights(copy, config)
    bomb(path, "archive/data.pkl")
    yield "a pickle that inflates", path, lambda: load_weights(copy, config)
    names = {f"embeddings.{name}.weight": torch.zeros(1).expand(1 << 24, 1 << 16) for name in ("word_embeddings",)}
    torch.save(names, path)
    yield "one number as a terabyte", path, lambda: load_weights(copy, config)
    torch.save({"x": torch.zeros(1 << 40, device="meta")}, path)
    yield "a tensor without memory", path, lambda: load_weights(copy, config)
    torch.save({5: torch.zeros(3)}, path)
    yield "a number for a name", path, lambda: load_weights(copy, config)
    path.unlink()
    shutil.copyfile(bert / "model.safetensors", copy / "model.safetensors")

    path = copy / "config.json"
    plain = json.loads(path.read_text())
    for name, content in hostile_json().items():
        try:
            values = json.loads(content.decode())
            content = json.dumps({**plain, **values}).encode()
        except (ValueError, RecursionError, TypeError):
            pass
        path.write_bytes(content)
        yield f"config.json: {name}", path.with_name("m"), build
    sparse(path, 10 << 30, b'{"a": "')
    yield "config.json of 10 GB", path, build
    path.write_text(json.dumps(plain))

    words = (bert / "vocab.txt").read_text().splitlines()
    for name in ("vocab.txt", "tokenizer.json"):
        sparse(copy / name, 10 << 30)
        yield f"{name} of 10 GB", copy / name, build
        sparse(copy / name, MAX_BYTES + 1)
        yield f"{name} of more than is read", copy / name, build
    made = {"version": "1.0", "added_tokens": [], "model": {"type": "WordPiece", "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}  # fmt: skip
    for name, vocabulary, more in (
        ("an id of two billion", {**{word: i for i, word in enumerate(words)}, "surplus": 2_000_000_000}, {}),
        ("a word too many", {word: i for i, word in enumerate([*words, "surplus"])}, {}),
        ("no unknown word", {word: i for i, word in enumerate(words)}, {"unk_token": "nowhere"}),
        ("a hundred thousand words", {**{word: i for i, word in enumerate(words)}, **{f"w{i}": i + 9999 for i in
                                                                                 range(100_000)}}, {}),
    ):  # fmt: skip
        (copy / "tokenizer.json").write_text(json.dumps({**made, "model": {**made["model"], **more,  # type: ignore
                                                                           "vocab": vocabulary}}))  # fmt: skip
        yield f"tokenizer.json: {name}", copy, build
    for name, content in hostile_json().items():
        (copy / "tokenizer.json").write_bytes(content)
        yield f"tokenizer.json: {name}", copy / "tokenizer.json", build
    (copy / "tokenizer.json").unlink()

    path, whole = folder / "bad.pt", load(checkpoint)
    for name, change in hostile_contents(whole).items():
        save(path, {**whole, **change})
        yield f"checkpoint: {name}", path, lambda: load_model(path)
    for member in ("archive/data.pkl", "archive/data/0"):
        bomb(path, member)
        yield f"a checkpoint that inflates, {member}", path, lambda: load_model(path)
    sparse(path, 10 << 30, b"PK\3\4")
    yield "a checkpoint of 10 GB of zeros", path, lambda: load_model(path)

    peft = folder / "peft"
    peft.mkdir()
    for name, content in hostile_json().items():
        (peft / "adapter_config.json").write_bytes(content)
        yield f"adapter_config.json: {name}", peft, lambda: import_peft(peft)
    for rank in (1 << 40, 10**30, -1, 1.5, "1", [[]], True):
        (peft / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 1}))
        safetensors.torch.save_file(
            {f"base_model.model.encoder.layer.0.attention.self.query.lora_{own}.weight": torch.ones(3, 3)
             for own in "AB"}, peft / "adapter_model.safetensors",
        )  # fmt: skip
        yield f"rank {rank}", peft, lambda: import_peft(peft)
    (peft / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    for name, content in hostile_safetensors().items():
        (peft / "adapter_model.safetensors").write_bytes(content)
        yield f"adapters: {name}", peft, lambda: import_peft(peft)


def bomb(path: Path, member: str) -> None:
    """A checkpoint of which one member is a gigabyte of zeros, deflated to a megabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/version", "3\n")
        with out.open(member, "w") as file:
            for _ in range(1 << 8):
                file.write(bytes(1 << 22))


def hostile_contents(whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parts of a checkpoint that claim too much."""

    def config(group: str, **values: Any) -> dict[str, Any]:
        return {"config": {**whole["config"], group: {**whole["config"][group], **values}}}

    def shape(**values: int) -> dict[str, Any]:
        return {"bert_config": {**whole["bert_config"], **values}}

    def weights(tensor: Any) -> dict[str, Any]:
        return {"weights": {**whole["weights"], next(iter(whole["weights"])): tensor}}

    wide = shape(vocab_size=1 << 24, hidden_size=1 << 16)
    return {
        "a billion layers": shape(num_hidden_layers=1 << 30),
        "a hundred layers": shape(num_hidden_layers=100),
        "a huge vocabulary": shape(vocab_size=1 << 40),
        "a large vocabulary": wide,
        "a large vocabulary of one number": {
            **wide, **weights(torch.zeros(1).expand(1 << 24, 1 << 16)),
        },
        "weights without memory": weights(torch.zeros(3, device="meta")),
        "sparse weights": weights(torch.zeros(3, 3).to_sparse()),
        "weights that are a text": weights("x"),
        "no weights": {"weights": None},
        "a list of weights": {"weights": [torch.zeros(3)]},
        "a number for a name": {"weights": {**whole["weights"], 5: torch.zeros(3)}},
        "adapters of a huge rank": config("lora", lora_mode="attn", lora_rank=1 << 40),
        "adapters of rank 2^20": config("lora", lora_mode="attn", lora_rank=1 << 20),
        "a million layers in a head": config("model", head_layers=1_000_000),
        "pals of a huge size": config("pal", pal="pal", pal_size=12 << 40),
        "a nested value": config("model", arch=deeply_nested(300)),
        "a nested shape": {"bert_config": {**whole["bert_config"], "hidden_size": deeply_nested(300)}},
        "tasks without end": {"tasks": ["sst"] * 1000 + ["mnli"]},
        "tasks of lists": {"tasks": [[]]},
        "no task": {"tasks": []},
        "a hash that is none": {**config("lora", lora_mode="attn"), "base_sha256": [1]},
        "a tokenizer that is a number": {"tokenizer": 5},
        "a tokenizer of nesting": {"tokenizer": "[" * 1_000_000},
    }  # fmt: skip


def test_names_that_a_terminal_would_obey_are_spelled_out(
    trained: Trainer, adapters: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """A screen that is cleared, and a line that looks like one of ours."""
    name = "\x1b[2Jx\nerror: all is well"
    content, bert, peft = load(trained.run.best), tmp_path / "bert", tmp_path / "peft"
    message = refused(
        lambda: load_model(Path("odd.pt"), {**content, "weights": {**content["weights"], name: torch.zeros(3)}}),
        "odd.pt", f"unknown {name!r}",
    )  # fmt: skip
    shutil.copytree(tiny_bert, bert)
    tensors = safetensors.torch.load_file(bert / "model.safetensors")
    safetensors.torch.save_file({**tensors, name: torch.zeros(3)}, bert / "model.safetensors")
    message += refused(lambda: load_weights(bert, read_config(bert)), str(bert), f"1 left over: {name!r}")
    shutil.copytree(adapters / "peft" / "sentiment", peft)
    tensors = safetensors.torch.load_file(peft / "adapter_model.safetensors")
    safetensors.torch.save_file({**tensors, name: torch.zeros(3)}, peft / "adapter_model.safetensors")
    message += refused(lambda: import_peft(peft), str(peft), f"{name!r} is no adapter")
    assert message.isprintable()


def deeply_nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


def test_claims_without_end_are_refused_in_bounded_memory(trained: Trainer, tiny_bert: Path, tmp_path: Path) -> None:
    """In a process that may take one more gigabyte; what it takes at most is measured."""
    words = [sys.executable, "-c", BOUNDED, ROOT, ROOT / "tests", tmp_path, trained.run.best, tiny_bert]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"oversized files: {report}")
    assert report["count"] > 120
    assert report["risen"] < 400 << 20
    assert report["slowest"][0] < 60  # on a busy machine


def test_json_is_read_up_to_a_size_and_a_depth(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, words in ((b" " * (MAX_JSON + 1), "larger than 4 MiB"), (b"[" * 100_000, "nested too deeply")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa9"]}'.ljust(MAX_JSON))
    assert read_json(path) == {"a": [1, "é"]}


def test_arrays_that_inflate_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arrays, path = {"x": np.arange(3)}, tmp_path / "minbert" / "arrays" / f"tokens-{'k' * 32}.npz"
    cached("tokens", "k" * 64, lambda: arrays)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("names.npy", bytes(1 << 26))
    assert cached("tokens", "k" * 64, lambda: arrays) is arrays
    outputs = tmp_path / "outputs.npz"
    np.savez_compressed(outputs, **{"dev/sst": np.zeros((1 << 20, 5))})
    assert read_outputs(outputs) is None
    np.savez(outputs, **{"dev/sst": np.zeros((3, 5))})
    assert read_outputs(outputs) is not None


@pytest.mark.parametrize("how", ["one row less", "another width", "text", "no number", "another task", "a scalar"])
def test_kept_predictions_that_are_none_are_made_again(
    trained: Trainer, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    words = [str(trained.run.best), "--data_dir", str(small_data), "--threads", "1"]
    words += ["--run_dir", str(tmp_path / "e"), "--cache", str(tmp_path / "cache")]
    ensemble.main(words)
    scores = (tmp_path / "e" / "scores.json").read_bytes()
    [path] = (tmp_path / "cache").iterdir()
    with np.load(path) as saved:
        arrays = dict(saved)
    own = arrays["dev/sst"]
    changes = {
        "one row less": own[1:], "another width": own[:, 1:], "text": own.astype(str), "no number": own * np.nan,
        "a scalar": np.float32(1),
    }  # fmt: skip
    np.savez(path, **({**arrays, "dev/sst": changes[how]} if how in changes else {"dev/mnli": own}))  # type: ignore
    capsys.readouterr()
    ensemble.main(words)
    assert "best.pt: predicted" in capsys.readouterr().out
    assert (tmp_path / "e" / "scores.json").read_bytes() == scores


ODD: list[Any] = [
    None, 5, -1, 2**70, 0.5, 1e308, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}, b"x", True, (1,),
    torch.zeros(2),
]  # fmt: skip


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside nested dictionaries, groups included."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, own in content.items():
            yield from leaves(own, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    return {**content, path[0]: replaced(content[path[0]], path[1:], value)}


def test_odd_values_anywhere_in_a_checkpoint_are_refused_or_harmless(trained: Trainer) -> None:
    """At 500 random places."""
    whole = load(trained.run.best)
    small = {key: own for key, own in whole.items() if key != "weights"}
    places = [(path, value) for path in leaves(small) for value in range(len(ODD)) if path != ("format",)]
    chosen = np.random.default_rng(0).permutation(len(places))[:500]
    refusals = 0
    for i in chosen:
        path, value = places[i]
        try:
            model, tokenizer, config = load_model(Path("odd.pt"), replaced(whole, path, ODD[value]))
        except UserError as error:
            assert "\n" not in str(error), (path, error)
            assert "odd.pt" in str(error) or "--lora_dict" in str(error), (path, error)
            refusals += 1
        else:
            assert isinstance(model, MultitaskBERT) and isinstance(tokenizer, Tokenizer) and isinstance(config, Config)
    print(f"odd values: {refusals} of {len(chosen)} of {len(places)} refused")
    assert refusals > 300


def test_sizes_that_cannot_be_are_refused_by_name() -> None:
    for name, value in (
        ("vocab_size", 1 << 40), ("num_hidden_layers", 129), ("hidden_size", 0), ("layer_norm_eps", float("nan")),
        ("hidden_dropout_prob", 1.5), ("intermediate_size", True), ("pad_token_id", -1), ("type_vocab_size", "2"),
    ):  # fmt: skip
        refused(lambda name=name, value=value: BertConfig.from_dict({name: value}, "x.json"), "x.json", name)
    assert BertConfig.from_dict({"vocab_size": 1_000_000, "num_hidden_layers": 48}).vocab_size == 1_000_000


# ------------------------------------------------------------------------------------------- adapters that do not fit


def peft_with(source: Path, folder: Path, change: str) -> Path:
    """A copy of a peft adapter with one thing wrong."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    tensors, config = safetensors.torch.load_file(path), json.loads((folder / "adapter_config.json").read_text())
    first = next(iter(tensors))
    if change == "another rank":
        tensors = {name: torch.cat([own, own], dim=0 if "lora_A" in name else 1) for name, own in tensors.items()}
        config["r"] *= 2
    elif change == "a rank that is not the tensors'":
        config["r"] += 1
    elif change == "a key missing":
        del tensors[first]
    elif change == "a layer too many":
        tensors[first.replace("layer.0", "layer.7")] = tensors[first].clone()
    elif change == "another width":
        tensors = {name: own[..., :-1].contiguous() for name, own in tensors.items()}
    elif change == "a foreign key":
        tensors["base_model.model.pooler.dense.lora_A.weight"] = torch.ones(2, 32)
    elif change == "three dimensions":
        tensors[first] = tensors[first][None]
    elif change == "twice":
        tensors[first.replace("encoder.", "bert.encoder.")] = tensors[first].clone()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, path)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a rank that is not the tensors'", ["has rank 2, but adapter_config.json says r 3"]),
        ("a key missing", ["1 missing: bert_layers.0."]),
        ("a layer too many", ["1 left over: bert_layers.7."]),
        ("another width", ["of the wrong shape", "lora_A is [2, 31], not [2, 32]"]),
        ("a foreign key", ["pooler.dense.lora_A.weight is no adapter of"]),
        ("three dimensions", ["3 dimensions"]),
        ("twice", ["is there twice"]),
    ],
)
def test_adapters_of_peft_that_do_not_fit(
    adapters: Path, tiny_flags: list[str], tmp_path: Path, change: str, words: list[str]
) -> None:
    """The line lists what is wrong; the model is left as it was, to the bit, adapters and all."""
    folder = peft_with(adapters / "peft" / "sentiment", tmp_path / "peft", change)
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    before, requires = copied(trainer.model), [p.requires_grad for p in trainer.model.parameters()]

    def start() -> None:
        trainer.model.start_from_adapters(*import_peft(folder), f"--init_peft {folder}")

    refused(start, str(folder), *words)
    after = copied(trainer.model)
    assert list(after) == list(before) and all(torch.equal(after[name], own) for name, own in before.items())
    assert trainer.model.lora is None and trainer.model.base_sha256 == ""
    assert [p.requires_grad for p in trainer.model.parameters()] == requires
    flags = [*tiny_flags, "--init_peft", str(folder), "--run_dir", str(tmp_path / "again")]
    refused(lambda: multitask_classifier.main(flags), str(folder), *words)
    assert not (tmp_path / "again").exists()


def test_adapters_of_another_base_do_not_fit(adapters: Path, tiny_flags: list[str], tmp_path: Path) -> None:
    """Of other layers, of another width, and of other weights of the same shape."""
    peft = adapters / "peft" / "sentiment"
    for shape, words in (
        ({"num_hidden_layers": 3}, ["6 missing: bert_layers.2."]),
        ({"num_hidden_layers": 1}, ["6 left over: bert_layers.1."]),
        ({"hidden_size": 16}, ["of the wrong shape"]),
    ):
        name = "-".join(shape)
        bert = make_bert(tmp_path / name / str(next(iter(shape.values()))), **shape)
        flags = [*tiny_flags, "--pretrained", str(bert), "--init_peft", str(peft), "--dry_run"]
        refused(lambda flags=flags: multitask_classifier.main(flags), "--init_peft", *words)
    other = make_bert(tmp_path / "seed", seed=1)
    content = load(adapters / "run" / "best.pt")
    content["config"]["model"]["pretrained"] = str(other)
    save(tmp_path / "moved.pt", content)
    refused(lambda: load_model(tmp_path / "moved.pt"), "moved.pt", "other base weights", "SHA-256")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "rank", "kind", "base"])
def test_a_start_that_does_not_fit_changes_nothing(
    adapters: Path, tiny_flags: list[str], tmp_path: Path, change: str
) -> None:
    """--init_from with a checkpoint of adapters, one thing wrong in each."""
    from models.checkpoint import init_from_checkpoint

    content, path = load(adapters / "run" / "best.pt"), tmp_path / "start.pt"
    weights = content["weights"]
    name = next(name for name in weights if name.endswith("lora_A"))
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["backbones.sentiment.bert_layers.7.out_dense.lora_A"] = weights[name]
    elif change == "shape":
        weights[name] = weights[name][:, 1:].contiguous()
    elif change == "rank":
        content["config"]["lora"]["lora_rank"] = 3
    elif change == "kind":
        content["config"]["lora"]["dora"] = True
    else:
        content["base_sha256"] = "0" * 64
    words = {
        "missing": f"missing {name}", "extra": "unknown backbones.sentiment.bert_layers.7",
        "shape": f"{name} is (2, 31)",
        "rank": "is (2, 32) instead of (3, 32)", "kind": "missing backbones.sentiment.bert_layers.0.self_attention",
        "base": "other base weights",
    }  # fmt: skip
    save(path, content)
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    before = copied(trainer.model)
    refused(lambda: init_from_checkpoint(trainer.model, trainer.tokenizer, path, print), "start.pt", words[change])
    after = copied(trainer.model)
    assert list(after) == list(before) and all(torch.equal(after[key], own) for key, own in before.items())
    flags = [*tiny_flags, "--init_from", str(path), "--run_dir", str(tmp_path / "again")]
    refused(lambda: multitask_classifier.main(flags), "start.pt", words[change])
    assert not (tmp_path / "again").exists()
