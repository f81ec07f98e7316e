"""sample_topics.py: exact quotas, drawn by the seed, from topics that a column or the embeddings give."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, refusal, shell

import sample_topics
from base_bert import load_weights, read_config
from bert import BertModel
from datasets import BadRows, Examples, read_examples
from studies.topics import Topic, draw, nearest_topics, read_topics
from tasks import PARA, STS
from text.tokenizer import load_tokenizer

TOPICS = "# ours\nCats: 3: cat, small cats\n\nDogs and wolves: 5: dog\n"
LABELS = ["Cats", "Dogs and wolves", "Cats", "Birds", "Dogs and wolves"] * 4


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> Examples:
    return read_examples(path, PARA, "train", BadRows(0, print))


def topics_in(path: Path) -> list[str]:
    """Return the last column of a sample."""
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    assert header == ["", "id", "sentence1", "sentence2", "is_duplicate", "topic"]
    return [row[-1] for row in rows]


def labelled(folder: Path, small_data: Path, labels: list[str]) -> Path:
    """Write the small data's Quora file with a column of topics before its other columns."""
    header, *rows = (small_data / "quora-train.csv").read_text(encoding="utf-8").splitlines()
    lines = [f"topic\t{header}", *(f"{label}\t{row}" for label, row in zip(labels, rows, strict=True))]
    return write(folder / "labelled.csv", "\n".join(lines) + "\n")


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    return write(tmp_path / "topics.txt", TOPICS)


@pytest.fixture
def source(tmp_path: Path, small_data: Path) -> Path:
    return labelled(tmp_path, small_data, LABELS)


def sample(*words: object) -> None:
    sample_topics.main([str(word) for word in words])


def test_quotas_of_r2() -> None:
    """Appendix A.1 has 10,000 in all."""
    topics = read_topics(ROOT / "recipes" / "r2" / "topics.txt")
    assert [topic.quota for topic in topics.values()] == [2500, 2500, 1500, 1100, 800, 600, 500, 200, 200, 100]
    assert list(topics)[2:6] == ["B2B/SaaS", "Entertainment", "Jobs and Career", "Finance"]


def test_topics_may_have_spaces_colons_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "\ufeffCats: 3: cat, small  cats,\n \nTimes of day:2 :12:30 , noon\n")
    wanted = {"Cats": Topic(3, ("cat", "small  cats")), "Times of day": Topic(2, ("12:30", "noon"))}
    assert read_topics(path) == wanted


def test_quotas_are_exact_and_rows_are_unchanged(
    tmp_path: Path, source: Path, topics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "sample.csv"
    sample("--topics", topics, "--para_train", source, "--out", out)
    assert Counter(topics_in(out)) == {"Cats": 3, "Dogs and wolves": 5}
    counts = [line.split()[-2:] for line in capsys.readouterr().out.splitlines()]
    assert all(pair in counts for pair in (["examples", "drawn"], ["8", "3"], ["8", "5"], ["20", "8"]))
    whole, drawn = read(source), read(out)
    place = {row_id: i for i, row_id in enumerate(whole.ids)}
    chosen = [place[row_id] for row_id in drawn.ids]
    assert chosen == sorted(set(chosen)) and whole.labels is not None and drawn.labels is not None
    assert [LABELS[i] for i in chosen] == topics_in(out)
    assert drawn.texts == tuple([column[i] for i in chosen] for column in whole.texts)
    assert drawn.labels.tolist() == whole.labels[chosen].tolist()


@pytest.mark.parametrize("how", ["quoted", "with a mark at the start"])
def test_a_column_of_topics_is_found_and_used(tmp_path: Path, source: Path, topics: Path, how: str) -> None:
    """Otherwise a model would be asked."""
    sample("--topics", topics, "--para_train", source, "--out", tmp_path / "plain.csv")
    text = source.read_text(encoding="utf-8")
    source.write_text("\ufeff" + text if how != "quoted" else text.replace("topic\t", '"topic"\t', 1), encoding="utf-8")
    sample("--topics", topics, "--para_train", source, "--out", tmp_path / "out.csv", "--pretrained", "/nowhere")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


@pytest.mark.parametrize("form", ["lines", "list", "both texts"])
def test_labels_of_a_zero_shot_classifier(tmp_path: Path, small_data: Path, topics: Path, form: str) -> None:
    """In the form that R2's classifier gives them; the likeliest label counts, in whatever order."""
    pairs = zip(*read(small_data / "quora-train.csv").texts, strict=True)
    results = [
        {"sequence": f"{a} {b}" if form == "both texts" else f" {a}\n", "labels": ["Fish", label], "scores": [0.3, 0.7]}
        for (a, b), label in zip(pairs, LABELS, strict=True)
    ]
    text = json.dumps(results) if form == "list" else "\n".join(map(json.dumps, results))
    words = ["--topics", topics, "--data_dir", small_data, "--pretrained", "/nowhere", "--labels"]
    sample(*words, write(tmp_path / "labels", text), "--out", tmp_path / "out.csv")
    source = labelled(tmp_path, small_data, LABELS)
    sample("--topics", topics, "--para_train", source, "--out", tmp_path / "wanted.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "wanted.csv").read_bytes()
    write(tmp_path / "labels", "\n".join(map(json.dumps, results[1:])))
    assert "lacks 1 of 20" in refusal(sample, *words, tmp_path / "labels", "--out", tmp_path / "o.csv")
    for damaged in ("", "{}", "[3]", json.dumps({**results[0], "scores": []})):
        message = refusal(sample, *words, write(tmp_path / "labels", damaged), "--out", tmp_path / "o.csv")
        assert message.startswith(f"--labels {tmp_path / 'labels'}: cannot be read")


def test_the_seed_decides(tmp_path: Path, source: Path, topics: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample("--topics", topics, "--quora_train", source, "--out", tmp_path / name, "--seed", seed, "--task", "quora")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_another_quota_does_not_change_the_other_topics() -> None:
    names = np.array(["a"] * 50 + ["b"] * 50)
    few, many = (draw(names, {"a": Topic(10, ("x",)), "b": Topic(count, ("y",))}, 7) for count in (5, 40))
    assert few[few < 50].tolist() == many[many < 50].tolist() and len(set(few.tolist())) == 15
    equal = draw(names, {name: Topic(10, ("x",)) for name in "ab"}, 7)
    assert equal[:10].tolist() != (equal[10:] - 50).tolist()
    everything = draw(names, {"a": Topic(50, ("x",)), "b": Topic(50, ("y",))}, 7)
    assert everything.tolist() == list(range(100))


def test_every_example_can_be_drawn() -> None:
    names = np.array(["a", "b"] * 10)
    counts = Counter(i for seed in range(300) for i in draw(names, {"a": Topic(4, ("x",))}, seed).tolist())
    assert set(counts) == set(range(0, 20, 2)) and min(counts.values()) > 80 and max(counts.values()) < 160


def test_the_nearest_topic() -> None:
    """What all embeddings have in common does not count, nor does their length."""
    generator = np.random.default_rng(0)
    topics = generator.normal(size=(3, 8))
    wanted = np.arange(60) % 3
    lengths = generator.uniform(0.5, 2, (60, 1))
    examples = 100 + lengths * (topics - topics.mean(axis=0))[wanted] + generator.normal(size=(60, 8)) * 0.05
    assert nearest_topics(examples, topics + 7).tolist() == wanted.tolist()


def test_topics_by_embeddings_equal_those_of_each_text_alone(tmp_path: Path, tiny_bert: Path, small_data: Path) -> None:
    long = " ".join(["a superb plot"] * 30)  # of more tokens than the model has positions
    words = {"films": ("film", long), "animals": ("goat", "cat"), "work": ("job",)}
    config = read_config(tiny_bert)
    model, tokenizer = BertModel(config), load_tokenizer(tiny_bert, 64)
    model.load_state_dict(load_weights(tiny_bert, config))
    model.eval()

    def embed(text: str) -> np.ndarray:
        ids = torch.from_numpy(tokenizer.encode([text]).input_ids.astype(np.int64))[None]
        with torch.no_grad():
            return model(ids, torch.ones_like(ids))["last_hidden_state"][0].mean(dim=0).double().numpy()

    pairs = zip(*read(small_data / "quora-train.csv").texts, strict=True)
    examples = np.array([(embed(a) + embed(b)) / 2 for a, b in pairs])
    topics = np.array([np.mean([embed(word) for word in of_topic], axis=0) for of_topic in words.values()])
    examples, topics = examples - examples.mean(axis=0), topics - topics.mean(axis=0)
    cosines = (examples @ topics.T) / np.linalg.norm(examples, axis=1)[:, None] / np.linalg.norm(topics, axis=1)
    wanted = [list(words)[i] for i in cosines.argmax(axis=1)]
    counts = Counter(wanted)
    assert len(counts) == 3  # else choose other words
    text = "".join(f"{name}: {counts[name]}: {', '.join(of_topic)}\n" for name, of_topic in words.items())
    flags = ["--data_dir", small_data, "--pretrained", tiny_bert, "--eval_batch_size", 3, "--threads", 1]
    sample("--topics", write(tmp_path / "t.txt", text), "--out", tmp_path / "out.csv", *flags)
    assert topics_in(tmp_path / "out.csv") == wanted
    # the column of the sample is used without a model
    sample("--topics", tmp_path / "t.txt", "--out", tmp_path / "again.csv", "--para_train", tmp_path / "out.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


def test_a_sample_of_another_task_keeps_its_labels(tmp_path: Path, tiny_bert: Path, small_data: Path) -> None:
    topics = write(tmp_path / "t.txt", "all: 20: goat\n")
    flags = ["--data_dir", small_data, "--pretrained", tiny_bert, "--threads", 1, "--task", "sts"]
    sample("--topics", topics, "--out", tmp_path / "out.csv", *flags)
    paths = (tmp_path / "out.csv", small_data / "sts-train.csv")
    found, wanted = (read_examples(path, STS, "train", BadRows(0, print)) for path in paths)
    assert found.labels is not None and wanted.labels is not None and found.ids == wanted.ids
    assert found.texts == wanted.texts and np.array_equal(found.labels, wanted.labels)


@pytest.mark.parametrize(
    "line",
    ["Cats 3 cat", "Cats: many: cat", "Cats: 3", "Cats: 3: ,", ": 3: cat", "Cats: 0: cat", "Cats: -1: cat", "A: ²: a"],
)
def test_a_line_that_is_not_a_topic_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t.txt", f"# fine\nDogs: 3: dog\n{line}\n")
    message = refusal(read_topics, path)
    assert f"{path}, line 3" in message and "Finance: 600: money" in message


def test_a_file_without_topics_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(read_topics, tmp_path / "t.txt")
    for text, wanted in (("", "has no topic"), ("A: 1: a\nA: 2: b\n", "there twice")):
        assert wanted in refusal(read_topics, write(tmp_path / "t.txt", text))


def test_a_quota_that_is_too_high_is_named(tmp_path: Path, source: Path) -> None:
    topics = write(tmp_path / "t.txt", "Cats: 9: cat\nFish: 2: fish\nBirds: 4: bird\n")
    message = refusal(sample, "--topics", topics, "--para_train", source, "--out", tmp_path / "out.csv")
    assert "Cats has 8 of 9" in message and "Fish has 0 of 2" in message and "Birds" not in message
    assert not (tmp_path / "out.csv").exists()


def test_missing_flags_and_files_are_named(tmp_path: Path, topics: Path, small_data: Path) -> None:
    out = tmp_path / "out.csv"
    assert "--out" in refusal(sample, "--topics", topics)
    assert "--topics" in refusal(sample, "--out", out)
    write(tmp_path / "file", "x")
    message = refusal(sample, "--topics", topics, "--out", tmp_path / "file" / "out.csv", "--data_dir", small_data)
    assert f"--out {tmp_path / 'file'}: cannot be written" in message  # before a model embeds all questions
    assert "--task films" in refusal(sample, "--topics", topics, "--out", out, "--task", "films")
    message = refusal(sample, "--topics", topics, "--out", out, "--data_dir", tmp_path)
    assert "quora-train.csv" in message and "--para_train" in message
    assert "--para_train no.csv" in refusal(sample, "--topics", topics, "--out", out, "--para_train", "no.csv")
    for path in (tmp_path, small_data / "quora-train.csv"):  # a folder, and what the sample would replace
        message = refusal(sample, "--topics", topics, "--out", path, "--data_dir", small_data)
        assert f"--out {path}: is " in message and path.exists()


def test_bad_rows_are_named_and_limited(tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = labelled(tmp_path, small_data, [*LABELS[:-1], ""])
    words = ["--topics", write(tmp_path / "t.txt", "Cats: 3: cat\n"), "--para_train", source]
    sample(*words, "--out", tmp_path / "out.csv")
    assert capsys.readouterr().out.count("topic is empty") == 1
    message = refusal(sample, *words, "--out", tmp_path / "o.csv", "--max_bad_rows", 0)
    assert "unreadable rows: 1" in message


def test_the_script_has_help() -> None:
    done = shell("sample_topics.py", "--help")
    assert done.returncode == 0 and "--topics" in done.stdout and "_train FILE" in done.stdout
    assert "--epochs" not in done.stdout
