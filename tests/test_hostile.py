"""Files made to do harm: pickles that would run code, claims of endless size, and adapters that belong elsewhere."""

import ast
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT, changed, configure, copied, fail, make_trainer, read_json, refusal

import ensemble
import multitask_classifier
import report
from base_bert import load_weights, read_config
from config import Config
from evaluation.members import find_members, read_outputs
from models.build import build_model
from models.checkpoint import load, load_model, save
from models.multitask_bert import MultitaskBERT
from models.peft_exchange import import_peft
from tasks import DEFAULT_TASKS, TASKS
from text.token_cache import cached
from text.tokenizer import MAX_BYTES, Tokenizer, load_tokenizer
from training.resume import newest_state
from training.run_directory import RunDirectory
from training.trainer import Trainer
from utils.errors import UserError
from utils.untrusted import MAX_JSON
from utils.untrusted import read_json as read_untrusted_json

Loads = Iterator[tuple[Path, Callable[[], object]]]  # a file, and a way to read it


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with a finished run of adapters, and these as peft has them in its folder `peft/sentiment`."""
    folder = tmp_path_factory.mktemp("adapters")
    flags = ["--lora_mode", "attn-only", "--lora_rank", 2, "--epochs", 1, "--fine_tune_mode", "full-model"]
    make_trainer(tiny_flags, folder / "run", *flags).fit()
    words = ["--evaluate", folder / "run" / "best.pt", "--export_peft", folder / "peft"]
    multitask_classifier.main([str(word) for word in words])
    return folder


def refused(run: Callable[[], object], *words: str) -> str:
    """Return the one line, with these words, that refuses something."""
    message = refusal(run)
    assert len(message) < 2000 and all(word in message for word in words), message
    return message


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
    """Return a pickle that imports module.name and calls it with a text, written opcode by opcode."""
    text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + text + b"\x85R."


def hostile_pickles(trap: Path) -> dict[str, bytes]:
    """Return pickles that make the file `trap` when they are run, by name."""
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
    made = {f"{name}, protocol {p}": pickle.dumps(value, p) for name, value in objects.items() for p in (2, 4)}
    for module, name in (("posix", "system"), ("os", "system"), ("builtins", "eval"), ("__builtin__", "eval")):
        made[f"opcodes {module}.{name}"] = by_opcodes(module, name, code if name == "eval" else touch)
    return made


def in_zip(payload: bytes, path: Path) -> None:
    """Write a torch.save file whose pickle is `payload`."""
    torch.save({"format": 1, "x": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as out:
        for name, content in members.items():
            out.writestr(name, payload if name.endswith("data.pkl") else content)


def in_npy(payload: bytes) -> bytes:
    """Return an array of objects as numpy would have pickled it."""
    out = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + payload


def in_npz(payload: bytes, path: Path) -> None:
    """Write an archive of arrays, all of them of objects; the list of names is one of them."""
    with zipfile.ZipFile(path, "w") as out:
        for name in ("names.npy", "x.npy", "dev/sst.npy"):
            out.writestr(name, in_npy(payload))


def loads_of_pickles(payload: bytes, folder: Path, tiny_bert: Path, bert: Path) -> Iterator[Callable[[], object]]:
    """Yield every way to load `payload`: raw and as torch's zip, in every file that is read."""
    config = read_config(tiny_bert)
    for write in (lambda file: file.write_bytes(payload), lambda file: in_zip(payload, file)):
        write(path := folder / "resume.pt")
        yield lambda path=path: load(path)
        yield lambda path=path: load(path, mmap=True)
        yield lambda path=path: load_model(path)
        yield lambda path=path: find_members([str(path)])
        yield lambda: newest_state(RunDirectory(folder), print)
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


def test_no_file_runs_code(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in a cache is made again in the place of the hostile file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trap, bert, count = tmp_path / "trap", shutil.copytree(tiny_bert, tmp_path / "bert"), 0
    (bert / "model.safetensors").unlink()
    for number, (name, payload) in enumerate(hostile_pickles(trap).items()):
        for attempt in loads_of_pickles(payload, tmp_path, tiny_bert, bert):
            refused(attempt)
            count += 1
            assert not trap.exists(), name
        key, arrays = f"{number:064d}", {"x": np.arange(3)}
        cached("examples", key, lambda arrays=arrays: arrays)
        kept = tmp_path / "minbert" / "arrays" / f"examples-{key[:32]}.npz"
        for write in (lambda file, p=payload: in_npz(p, file), lambda file, p=payload: file.write_bytes(in_npy(p))):
            write(tmp_path / "outputs.npz")
            assert read_outputs(tmp_path / "outputs.npz") is None
            write(kept)
            assert cached("examples", key, lambda arrays=arrays: arrays) is arrays and not trap.exists(), name
        assert cached("examples", key, fail)["x"].tolist() == [0, 1, 2]
        try:  # the trap works where pickles are trusted, so it is the loaders that kept it shut
            pickle.loads(payload)
        finally:
            assert trap.exists(), name
            trap.unlink()
    print(f"hostile pickles: {count} loads of {len(hostile_pickles(trap))} payloads")
    assert count > 400


def test_every_loader_says_so() -> None:
    """No call in the package reads a pickle with trust."""
    found, sources = (
        0,
        [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv")],
    )
    assert len(sources) > 80
    for path in sources:
        text = path.read_text(encoding="utf-8")
        reads_pickles = "import pickle" in text and path.name != "pickles.py"  # which makes nothing of them
        assert not reads_pickles and "joblib" not in text and "add_safe_globals" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                named = {word.arg: ast.unparse(word.value) for word in node.keywords}
                is_safe = named.get("weights_only") == "True" or named.get("allow_pickle") == "False"
                assert is_safe, f"{path}:{node.lineno}"
                found += 1
    assert found == 3


def safetensors_file(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file with this header, which may claim another length than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], first: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def hostile_safetensors() -> list[bytes]:
    """Return files that are no safetensors, though they begin like them."""
    one, deep = tensor([1], 0, 4), b"[" * 500_000
    empty = ",".join(f'"{i}": {{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10_000))
    return [
        *(safetensors_file({"x": one}, b"0000", length) for length in (1 << 60, (1 << 64) - 1, 1 << 63, 4096)),
        safetensors_file(b""),
        *(safetensors_file({"x": tensor(shape, 0, 4)}, b"0000")
          for shape in ([1000, 1000], [1 << 60], [1 << 32, 1 << 32, 4], [-1])),
        safetensors_file({"x": tensor([1], 0, 400)}, b"0" * 400),
        safetensors_file({"x": tensor([1], 4, 0)}, b"0000"),  # the end before the beginning
        safetensors_file({"x": tensor([1 << 20], 0, 4 << 20)}, b"0000"),  # the end beyond the file
        safetensors_file({"x": one, "y": one}, b"0000"),  # overlapping
        safetensors_file({"x": one, "y": tensor([1], 8, 12)}, b"0" * 12),  # with a gap
        safetensors_file({"x": one}, b"0" * 99),
        safetensors_file({"x": tensor([1], 0, 4, "O")}, b"0000"),  # of an unknown type
        *map(safetensors_file, (b"[1, 2]", b"{x: 1}", b'{"\xff": 1}', deep, b'{"__metadata__": {"a":' + deep)),
        safetensors_file(b'{"x": {"dtype": "F32", "shape": [' + b"1," * 1_000_000),
        safetensors_file(f"{{{empty}}}".encode()),
    ]  # fmt: skip


def sparse(path: Path, size: int, begin: bytes = b"") -> None:
    """Write a file of that size, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


HOSTILE_JSON = [
    b"[" * 1_000_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 200_000,
    b'{"hidden_size":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"hidden_size": 1' + b"0" * 1_000_000 + b"}",
    b"[]", b"null", b'"hidden_size"', b'{"layer_norm_eps": Infinity}', b'{"layer_norm_eps": NaN}',
    b'{"layer_norm_eps": 1e999}', b'{"vocab_size": 1099511627776}',
    b'{"vocab_size": 16777216, "hidden_size": 65536, "num_attention_heads": 64}', b'{"num_hidden_layers": 1000000000}',
    b'{"num_hidden_layers": 1000, "hidden_size": 98304, "intermediate_size": 16777216}', b'{"num_hidden_layers": 1.5}',
    b'{"vocab_size": 5, "pad_token_id": 5}', b" " * (MAX_JSON + 1), '{"hidden_size": 32}'.encode("utf-16"),
    b'{"\xff": 1}',
]  # fmt: skip


BOUNDED = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import conftest, test_hostile
from pathlib import Path
print(json.dumps(test_hostile.read_all(*map(Path, sys.argv[3:]))))
"""


def test_claims_without_end_are_refused_in_bounded_memory(trained: Trainer, tiny_bert: Path, tmp_path: Path) -> None:
    """In a process that may take one more gigabyte; what it takes at most is measured."""
    words = [sys.executable, "-c", BOUNDED, ROOT, ROOT / "tests", tmp_path, trained.checkpointer.run.best, tiny_bert]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"oversized files: {report}")
    assert report["count"] > 120 and report["risen"] < 400 << 20
    assert report["slowest"] < 60  # on a busy machine


def read_all(folder: Path, checkpoint: Path, bert: Path) -> dict[str, Any]:
    """Read every oversized file under a limit of memory; return how many there were, and by how much memory rose."""
    load_model(checkpoint)  # code and buffers are there now
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), resource.RLIM_INFINITY))
    before, count, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0
    for number, (path, read) in enumerate(oversized(folder, checkpoint, bert)):
        started = time.perf_counter()
        try:
            message = refused(read)
        except BaseException as error:
            raise AssertionError(f"file {number}, {path}") from error
        assert str(path) in message or str(path.parent) in message, (number, message)
        slowest, count = max(slowest, time.perf_counter() - started), count + 1
    risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"count": count, "risen": risen, "slowest": slowest}


def oversized(folder: Path, checkpoint: Path, bert: Path) -> Loads:
    """Yield files that claim or are too much, and how they are read."""
    copy = shutil.copytree(bert, folder / "bert")
    yield from oversized_weights(copy, read_config(bert))
    shutil.copyfile(bert / "model.safetensors", copy / "model.safetensors")
    yield from oversized_folders(copy)
    yield from oversized_checkpoints(folder / "bad.pt", load(checkpoint))
    yield from oversized_adapters(folder / "peft")


def oversized_weights(bert: Path, config: Any) -> Loads:
    """Yield weights of a BERT."""
    path = bert / "model.safetensors"

    def read() -> object:
        return load_weights(bert, config)

    for content in hostile_safetensors():
        path.write_bytes(content)
        yield path, read
    sparse(path, 10 << 30)
    yield path, read
    path.unlink()
    path = bert / "pytorch_model.bin"
    sparse(path, 10 << 30)
    yield path, read
    bomb(path, "archive/data.pkl")
    yield path, read
    for payload in (*pickles_that_claim(), legacy_claim()):
        path.write_bytes(payload)
        yield path, read
    for tensors in (
        {"embeddings.word_embeddings.weight": torch.zeros(1).expand(1 << 24, 1 << 16)},  # one number as a terabyte
        {"x": torch.zeros(1 << 40, device="meta")},
        {5: torch.zeros(3)},
    ):
        torch.save(tensors, path)
        yield path, read
    path.unlink()


def pickles_that_claim() -> list[bytes]:
    """Return short pickles that take four gigabytes, of calls that torch.load allows."""
    count, calls = b"\x8a\x05" + (4_000_000_000).to_bytes(5, "little"), ("builtins\nbytearray", "torch\nByteStorage")
    called = [b"\x80\x02c" + name.encode() + b"\n" + count + b"\x85R." for name in (*calls, "torch\nByteTensor")]
    memo = b"\x80\x02Nr" + (500_000_000).to_bytes(4, "little") + b"."
    return [*called, memo, b"\x80\x05\x96" + (4_000_000_000).to_bytes(8, "little") + b"x."]


def legacy_claim() -> bytes:
    """Return a file of torch's format before zip, of which a tensor claims to be larger than the file."""
    out = io.BytesIO()
    torch.save({"x": torch.zeros(70_000)}, out, _use_new_zipfile_serialization=False)
    size, claimed = (struct.pack("<BI", ord("J"), count) for count in (70_000, 2_000_000_000))
    content = out.getvalue()
    assert content.count(size) > 1  # of the storage and in the shape
    return content.replace(size, claimed)[:2000]


def oversized_folders(bert: Path) -> Loads:
    """Yield configurations and tokenizers of a BERT."""
    config = configure("--pretrained", bert, "--train_sst", "--max_length", 8)

    def read() -> object:
        return build_model(config, {"sst": TASKS["sst"]}, print)

    path, plain = bert / "config.json", read_json(bert / "config.json")
    for content in HOSTILE_JSON:
        with suppress(ValueError, RecursionError, TypeError):
            content = json.dumps({**plain, **json.loads(content.decode())}).encode()
        path.write_bytes(content)
        yield path, read
    sparse(path, 10 << 30, b'{"a": "')
    yield path, read
    path.write_text(json.dumps(plain))

    words = (bert / "vocab.txt").read_text().splitlines()
    for name in ("vocab.txt", "tokenizer.json"):
        for size in (10 << 30, MAX_BYTES + 1):
            sparse(bert / name, size)
            yield bert / name, read
    numbers = {word: i for i, word in enumerate(words)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    for changes in (
        {"vocab": numbers | {"surplus": 2_000_000_000}},
        {"vocab": numbers | {"surplus": len(words)}},
        {"vocab": numbers, "unk_token": "nowhere"},
        {"vocab": numbers | {f"w{i}": i + 9999 for i in range(100_000)}},
    ):
        made = {"version": "1.0", "added_tokens": [], "model": {**model, "max_input_chars_per_word": 100, **changes}}
        (bert / "tokenizer.json").write_text(json.dumps(made))
        yield bert / "tokenizer.json", read
    for content in HOSTILE_JSON:
        (bert / "tokenizer.json").write_bytes(content)
        yield bert / "tokenizer.json", read


def oversized_checkpoints(path: Path, whole: dict[str, Any]) -> Loads:
    """Yield checkpoints."""

    def read() -> object:
        return load_model(path)

    for changes in hostile_contents(whole):
        save(path, {**whole, **changes})
        yield path, read
    for member in ("archive/data.pkl", "archive/data/0"):
        bomb(path, member)
        yield path, read
    for payload in pickles_that_claim():
        path.write_bytes(payload)
        yield path, read
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("a/version", "3\n")
            out.writestr("a/data.pkl", payload)
        yield path, read
    sparse(path, 10 << 30, b"PK\3\4")
    yield path, read


def oversized_adapters(peft: Path) -> Loads:
    """Yield adapters of peft."""
    peft.mkdir()

    def read() -> object:
        return import_peft(peft)

    for content in HOSTILE_JSON:
        (peft / "adapter_config.json").write_bytes(content)
        yield peft, read
    query = "base_model.model.encoder.layer.0.attention.self.query"
    tensors = {f"{query}.lora_{half}.weight": torch.ones(3, 3) for half in "AB"}
    for rank in (1 << 40, 10**30, -1, 1.5, "1", [[]], True):
        (peft / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 1}))
        safetensors.torch.save_file(tensors, peft / "adapter_model.safetensors")
        yield peft, read
    (peft / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    for content in hostile_safetensors():
        (peft / "adapter_model.safetensors").write_bytes(content)
        yield peft, read


def bomb(path: Path, member: str) -> None:
    """Write a checkpoint of which one member is a gigabyte of zeros, deflated to a megabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/version", "3\n")
        with out.open(member, "w") as file:
            for _ in range(1 << 8):
                file.write(bytes(1 << 22))


def hostile_contents(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Return parts of a checkpoint that claim too much."""

    def config(group: str, **values: Any) -> dict[str, Any]:
        return {"config": {**whole["config"], group: {**whole["config"][group], **values}}}

    def shape(**values: Any) -> dict[str, Any]:
        return {"bert_config": {**whole["bert_config"], **values}}

    def weights(tensor: Any, name: Any = "heads.sst.2.weight") -> dict[str, Any]:
        return {"weights": {**whole["weights"], name: tensor}}

    wide, deep = shape(vocab_size=1 << 24, hidden_size=1 << 16), deeply_nested(300)
    return [
        shape(num_hidden_layers=1 << 30), shape(num_hidden_layers=100), shape(vocab_size=1 << 40), wide,
        {**wide, **weights(torch.zeros(1).expand(1 << 24, 1 << 16))}, shape(hidden_size=deep),
        weights(torch.zeros(3, device="meta")), weights(torch.zeros(3, 3).to_sparse()), weights("x"),
        weights(torch.zeros(3), 5), {"weights": None}, {"weights": [torch.zeros(3)]},
        config("lora", lora_mode="attn", lora_rank=1 << 40), config("lora", lora_mode="attn", lora_rank=1 << 20),
        config("model", head_layers=1_000_000), config("pal", pal="pal", pal_size=12 << 40), config("model", arch=deep),
        {"format": torch.ones(2)}, {"tasks": ["sst"] * 1000 + ["mnli"]}, {"tasks": [[]]}, {"tasks": []},
        {**config("lora", lora_mode="attn"), "base_sha256": [1]}, {"tokenizer": 5}, {"tokenizer": "[" * 1_000_000},
    ]  # fmt: skip


def deeply_nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def test_what_a_pickle_claims_is_refused_before_memory_is_taken(tmp_path: Path, tiny_bert: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    reasons = ("more than tensors", "'str' object is not callable", "more than tensors", "its memo claims", "2 remain")
    for payload, reason in zip((*pickles_that_claim(), legacy_claim()), (*reasons, "its tensors claim"), strict=True):
        path.write_bytes(payload)
        for read in (lambda: load(path), lambda: load_weights(tmp_path, read_config(tiny_bert))):
            refused(read, reason)


def test_a_pipe_in_place_of_a_file_ends_in_a_line(
    trained: Trainer, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading one would wait without end."""
    pipe, best = tmp_path / "pipe", trained.checkpointer.run.best
    os.mkfifo(pipe)
    flags, gate = [*tiny_flags, "--run_dir", tmp_path / "run"], signal.signal(signal.SIGALRM, fail)
    commands = [
        ("--evaluate", pipe), (*flags, "--init_from", pipe), (*flags, "--pretrained", pipe), (f"@{pipe}",),
        ("--evaluate", best, "--predict", pipe, "--task", "sst"), (*flags, "--sst_dev", pipe),
        (*flags, "--init_peft", pipe),
    ]  # fmt: skip
    signal.alarm(300)
    for words in commands:
        refused(lambda words=words: multitask_classifier.main([*map(str, words)]), str(pipe))
    refused(lambda: ensemble.main([str(pipe), str(best)]), str(pipe))
    for name in ("scores.json", "config.json", "metrics.jsonl", "timing.jsonl"):
        run = shutil.copytree(trained.checkpointer.run.path, tmp_path / name)
        (run / "scores.json").write_text('{"dev": {"score": 0.5}}')
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        with suppress(UserError):
            report.main([str(run), "--out", str(tmp_path / "report")])
    signal.alarm(0)
    signal.signal(signal.SIGALRM, gate)
    assert "it is a pipe or a device" in capsys.readouterr().out


def test_names_that_a_terminal_would_obey_are_spelled_out(
    trained: Trainer, adapters: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """A screen that is cleared, and a line that looks like one of ours."""
    name, spelled = "\x1b[2Jx\nerror: all is well", r"\x1b[2Jx\nerror: all is well"
    content = load(trained.checkpointer.run.best)
    odd = {**content, "weights": {**content["weights"], name: torch.zeros(3)}}
    message = refused(lambda: load_model(Path("odd.pt"), odd), "odd.pt", f"1 left over: {spelled}")
    bert = shutil.copytree(tiny_bert, tmp_path / "bert")
    peft = shutil.copytree(adapters / "peft" / "sentiment", tmp_path / "peft")
    for path in (bert / "model.safetensors", peft / "adapter_model.safetensors"):
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({**tensors, f"encoder.{name}": torch.zeros(3)}, path)
    message += refused(lambda: load_weights(bert, read_config(bert)), str(bert), f"1 left over: encoder.{spelled}")
    message += refused(lambda: import_peft(peft), str(peft), f"encoder.{spelled} is no adapter")
    assert message.isprintable()


def test_json_is_read_up_to_a_size_and_a_depth(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, words in ((b" " * (MAX_JSON + 1), "larger than 4 MiB"), (b"[" * 100_000, "nested too deeply")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_untrusted_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa9"]}'.ljust(MAX_JSON))
    assert read_untrusted_json(path) == {"a": [1, "é"]}


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


def test_kept_predictions_that_are_none_are_made_again(
    trained: Trainer, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained.checkpointer.run.best), "--data_dir", str(small_data), "--threads", "1"]
    words += ["--run_dir", str(tmp_path / "e"), "--cache", str(tmp_path / "cache")]
    ensemble.main(words)
    scores = (tmp_path / "e" / "scores.json").read_bytes()
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path) as saved:
        arrays = dict(saved)
    values = arrays["dev/sst"]
    for odd in (values[1:], values[:, 1:], values.astype(str), values * np.nan, np.float32(1), None):
        changes = {"dev/mnli": values} if odd is None else {**arrays, "dev/sst": odd}
        np.savez(path, **changes)  # type: ignore[arg-type]
        capsys.readouterr()
        ensemble.main(words)
        assert "best.pt: predicted" in capsys.readouterr().out
        assert (tmp_path / "e" / "scores.json").read_bytes() == scores


ODD: list[Any] = [
    None, 5, -1, 2**70, 0.5, 1e308, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}, b"x", True, (1,),
    torch.zeros(2),
]  # fmt: skip


def places_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value inside nested dictionaries, groups included."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places_in(value, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    return {**content, path[0]: replaced(content[path[0]], path[1:], value)}


def test_odd_values_anywhere_in_a_checkpoint_are_refused_or_harmless(trained: Trainer) -> None:
    """At 500 random places."""
    whole = load(trained.checkpointer.run.best)
    small = {key: value for key, value in whole.items() if key not in ("weights", "format")}
    places = [(path, value) for path in places_in(small) for value in range(len(ODD))]
    chosen = np.random.default_rng(0).permutation(len(places))[:500]
    refusals = 0
    for path, value in (places[i] for i in chosen):
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


def spoil_adapter(folder: Path, change: str) -> None:
    """Make one thing wrong in a folder of peft."""
    path = folder / "adapter_model.safetensors"
    tensors, config = safetensors.torch.load_file(path), read_json(folder / "adapter_config.json")
    first = next(iter(tensors))
    if change == "a rank that is not the tensors'":
        config["r"] += 1
    elif change == "a key missing":
        del tensors[first]
    elif change == "a layer too many":
        tensors[first.replace("layer.0", "layer.7")] = tensors[first].clone()
    elif change == "three dimensions":
        tensors[first] = tensors[first][None]
    elif change == "twice":
        tensors[first.replace("encoder.", "bert.encoder.")] = tensors[first].clone()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a rank that is not the tensors'", ["has rank 2, but adapter_config.json says r 3"]),
        ("a key missing", ["1 missing: bert_layers.0."]),
        ("a layer too many", ["1 left over: bert_layers.7."]),
        ("three dimensions", ["3 dimensions"]),
        ("twice", ["is there twice"]),
    ],
)
def test_adapters_of_peft_that_do_not_fit(
    adapters: Path, tiny_flags: list[str], tmp_path: Path, change: str, words: list[str]
) -> None:
    """The line lists what is wrong; the model is left as it was, to the bit, adapters and all."""
    folder = shutil.copytree(adapters / "peft" / "sentiment", tmp_path / "peft")
    spoil_adapter(folder, change)
    model, _ = build_model(configure(*tiny_flags), DEFAULT_TASKS, print)
    before = copied(model)
    refused(lambda: model.start_from_adapters(*import_peft(folder), f"--init_peft {folder}"), str(folder), *words)
    assert changed(before, copied(model)) == set() and model.lora is None and model.base_sha256 == ""
    assert all(parameter.requires_grad for parameter in model.parameters())
    flags = [*tiny_flags, "--init_peft", str(folder), "--run_dir", str(tmp_path / "again")]
    refused(lambda: multitask_classifier.main(flags), str(folder), *words)
    assert not (tmp_path / "again").exists()
