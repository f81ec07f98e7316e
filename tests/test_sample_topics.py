"""sample_topics.py: exact quotas, drawn by the seed, from topics that a column or the embeddings tell."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_config import ROOT
from test_scripts import refusal as refusal_of
from test_scripts import shell

import sample_topics
from base_bert import load_weights, read_config
from bert import BertModel
from datasets import BadRows, Examples, read_examples
from sample_topics import Topic, drawn, nearest, read_topics
from tasks import PARA, STS
from text.tokenizer import load_tokenizer

R2 = ROOT / "recipes" / "r2" / "topics.txt"
TOPICS = "# ours\nCats: 3: cat, small cats\n\nDogs and wolves: 5: dog\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> Examples:
    bad_rows = BadRows(0, print)
    return read_examples(path, PARA, "train", bad_rows)


def topics_in(path: Path) -> list[str]:
    """The last column of a table, read without our own reader."""
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    assert header == ["", "id", "sentence1", "sentence2", "is_duplicate", "topic"]
    return [row[-1] for row in rows]


def labelled(folder: Path, small_data: Path, labels: list[str]) -> Path:
    """The small data's Quora file with a column of topics before its other columns."""
    header, *rows = (small_data / "quora-train.csv").read_text(encoding="utf-8").splitlines()
    lines = [f"topic\t{header}", *(f"{label}\t{row}" for label, row in zip(labels, rows, strict=True))]
    return write(folder / "labelled.csv", "\n".join(lines) + "\n")


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    return write(tmp_path / "topics.txt", TOPICS)


def sample(*words: object) -> None:
    sample_topics.main([str(word) for word in words])


LABELS = ["Cats", "Dogs and wolves", "Cats", "Birds", "Dogs and wolves"] * 4


def test_quotas_of_r2() -> None:
    """A.1: 10,000 in all."""
    quotas = [topic.quota for topic in read_topics(R2).values()]
    assert quotas == [2500, 2500, 1500, 1100, 800, 600, 500, 200, 200, 100] and sum(quotas) == 10_000
    assert list(read_topics(R2))[2:6] == ["B2B/SaaS", "Entertainment", "Jobs and Career", "Finance"]


def test_topics_however_they_are_written(tmp_path: Path) -> None:
    """After a byte order mark, with spaces anywhere, and with colons among the words."""
    path = write(tmp_path / "t.txt", "\ufeffCats: 3: cat, small  cats,\n \nTimes of day:2 :12:30 , noon\n")
    wanted = {"Cats": Topic(3, ("cat", "small  cats")), "Times of day": Topic(2, ("12:30", "noon"))}
    assert read_topics(path) == wanted


def test_quotas_are_exact_and_the_rows_are_the_files_own(
    tmp_path: Path, small_data: Path, topics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = labelled(tmp_path, small_data, LABELS), tmp_path / "out" / "sample.csv"
    sample("--topics", topics, "--para_train", source, "--out", out)
    assert Counter(topics_in(out)) == {"Cats": 3, "Dogs and wolves": 5}
    counts = [line.split()[-2:] for line in capsys.readouterr().out.splitlines()]
    assert all(own in counts for own in (["examples", "drawn"], ["8", "3"], ["8", "5"], ["20", "8"]))
    whole, own = read(source), read(out)
    place = {row_id: i for i, row_id in enumerate(whole.ids)}
    chosen = [place[row_id] for row_id in own.ids]
    assert chosen == sorted(set(chosen)) and whole.labels is not None and own.labels is not None
    assert [LABELS[i] for i in chosen] == topics_in(out)
    assert own.texts == tuple([column[i] for i in chosen] for column in whole.texts)
    assert own.labels.tolist() == whole.labels[chosen].tolist()


@pytest.mark.parametrize("how", ["quoted", "with a mark at the start"])
def test_a_column_of_topics_is_found_however_it_is_written(
    tmp_path: Path, small_data: Path, topics: Path, how: str
) -> None:
    """Otherwise a model would be asked, and its labels would stand in the sample."""
    source = labelled(tmp_path, small_data, LABELS)
    sample("--topics", topics, "--para_train", source, "--out", tmp_path / "plain.csv")
    text = source.read_text(encoding="utf-8")
    other = "\ufeff" + text if how != "quoted" else text.replace("topic\t", '"topic"\t', 1)
    source.write_text(other, encoding="utf-8")
    sample("--topics", topics, "--para_train", source, "--out", tmp_path / "out.csv", "--pretrained", "/nowhere")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


def test_the_seed_decides(tmp_path: Path, small_data: Path, topics: Path) -> None:
    source = labelled(tmp_path, small_data, LABELS)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample("--topics", topics, "--quora_train", source, "--out", tmp_path / name, "--seed", seed, "--task", "quora")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_another_quota_leaves_the_other_topics_alone() -> None:
    labels = np.array(["a"] * 50 + ["b"] * 50)
    few, many = (drawn(labels, {"a": Topic(10, ("x",)), "b": Topic(count, ("y",))}, 7) for count in (5, 40))
    assert few[few < 50].tolist() == many[many < 50].tolist() and len(set(few.tolist())) == 15
    alike = drawn(labels, {name: Topic(10, ("x",)) for name in "ab"}, 7)
    assert alike[:10].tolist() != (alike[10:] - 50).tolist()
    everything = drawn(labels, {"a": Topic(50, ("x",)), "b": Topic(50, ("y",))}, 7)
    assert everything.tolist() == list(range(100))


def test_every_example_can_be_drawn() -> None:
    labels = np.array(["a", "b"] * 10)
    counts = Counter(i for seed in range(300) for i in drawn(labels, {"a": Topic(4, ("x",))}, seed).tolist())
    assert set(counts) == set(range(0, 20, 2)) and min(counts.values()) > 80 and max(counts.values()) < 160


def test_a_quota_that_cannot_be_filled_is_named(tmp_path: Path, small_data: Path) -> None:
    source = labelled(tmp_path, small_data, LABELS)
    topics = write(tmp_path / "t.txt", "Cats: 9: cat\nFish: 2: fish\nBirds: 4: bird\n")
    message = refusal_of(sample, "--topics", topics, "--para_train", source, "--out", tmp_path / "out.csv")
    assert "Cats has 8 of 9" in message and "Fish has 0 of 2" in message and "Birds" not in message
    assert not (tmp_path / "out.csv").exists()


# ---------------------------------------------------------------------------------------------------------- embeddings


def test_the_nearest_topic() -> None:
    """What all embeddings have in common does not count, nor does their length."""
    generator = np.random.default_rng(0)
    topics = generator.normal(size=(3, 8))
    wanted = np.arange(60) % 3
    lengths = generator.uniform(0.5, 2, (60, 1))
    examples = 100 + lengths * (topics - topics.mean(axis=0))[wanted] + generator.normal(size=(60, 8)) * 0.05
    assert nearest(examples, topics + 7).tolist() == wanted.tolist()


def test_topics_by_the_backbones_own_embeddings(
    tmp_path: Path, tiny_bert: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padded, text by text, and by hand; each topic's quota is all that it has."""
    long = " ".join(["a superb plot"] * 30)  # of more tokens than the backbone has positions
    words = {"films": ("film", long), "animals": ("goat", "cat"), "work": ("job",)}
    shape = read_config(tiny_bert)
    model, tokenizer = BertModel(shape), load_tokenizer(tiny_bert, 64)
    model.load_state_dict(load_weights(tiny_bert, shape))
    model.eval()

    def mean(text: str) -> np.ndarray:
        ids = torch.from_numpy(tokenizer.encode([text]).input_ids.astype(np.int64))[None]
        with torch.no_grad():
            return model(ids, torch.ones_like(ids))["last_hidden_state"][0].mean(dim=0).double().numpy()

    examples = read(small_data / "quora-train.csv")
    own = np.array([(mean(a) + mean(b)) / 2 for a, b in zip(*examples.texts, strict=True)])
    topics = np.array([np.mean([mean(word) for word in given], axis=0) for given in words.values()])
    own, topics = own - own.mean(axis=0), topics - topics.mean(axis=0)
    cosines = (own @ topics.T) / np.linalg.norm(own, axis=1)[:, None] / np.linalg.norm(topics, axis=1)
    told = [list(words)[i] for i in cosines.argmax(axis=1)]
    counts = Counter(told)
    assert len(counts) == 3  # else choose other words
    text = "".join(f"{name}: {counts[name]}: {', '.join(given)}\n" for name, given in words.items())
    flags = ["--data_dir", small_data, "--pretrained", tiny_bert, "--eval_batch_size", 3, "--threads", 1]
    sample("--topics", write(tmp_path / "t.txt", text), "--out", tmp_path / "out.csv", *flags)
    assert topics_in(tmp_path / "out.csv") == told
    printed = capsys.readouterr().out
    assert all(line.split()[-2:] == [str(counts[name])] * 2 for name in words for line in printed.splitlines()
               if line.startswith(name))  # fmt: skip
    # and what is in the column now holds, without a model
    sample("--topics", tmp_path / "t.txt", "--out", tmp_path / "again.csv", "--para_train", tmp_path / "out.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


def test_other_tasks_have_topics_too(tmp_path: Path, tiny_bert: Path, small_data: Path) -> None:
    """STS with its labels of one decimal, exactly."""
    topics = write(tmp_path / "t.txt", "all: 20: goat\n")
    flags = ["--data_dir", small_data, "--pretrained", tiny_bert, "--threads", 1, "--task", "sts"]
    sample("--topics", topics, "--out", tmp_path / "out.csv", *flags)
    found, wanted = (
        read_examples(path, STS, "train", BadRows(0, print))
        for path in (tmp_path / "out.csv", small_data / "sts-train.csv")
    )
    assert found.labels is not None and wanted.labels is not None and found.ids == wanted.ids
    assert found.texts == wanted.texts and np.array_equal(found.labels, wanted.labels)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "text",
    [
        "Cats 3 cat",
        "Cats: many: cat",
        "Cats: 3",
        "Cats: 3: ,",
        ": 3: cat",
        "Cats: 0: cat",
        "Cats: -1: cat",
        "Cats: ²: cat",
    ],
)
def test_a_line_that_is_no_topic_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "t.txt", f"# fine\nDogs: 3: dog\n{text}\n")
    message = refusal_of(sample, "--topics", path, "--out", tmp_path / "out.csv")
    assert f"{path}, line 3" in message and "Finance: 600: money" in message


@pytest.mark.parametrize(
    ("text", "words"), [("", "has no topic"), ("A: 1: a\nA: 2: b\n", "there twice"), (None, "cannot be read")]
)
def test_a_file_without_topics_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "t.txt"
    if text is not None:
        write(path, text)
    assert words in refusal_of(sample, "--topics", path, "--out", tmp_path / "out.csv")


def test_missing_flags_and_files_are_named(tmp_path: Path, topics: Path, small_data: Path) -> None:
    assert "--out" in refusal_of(sample, "--topics", topics)
    assert "--topics" in refusal_of(sample, "--out", tmp_path / "out.csv")
    place = ["--topics", topics, "--out", tmp_path / "out.csv"]
    (tmp_path / "file").write_text("x")
    message = refusal_of(sample, "--topics", topics, "--out", tmp_path / "file" / "out.csv", "--data_dir", small_data)
    assert f"--out {tmp_path / 'file'}: cannot be written" in message  # before a model embeds all questions
    assert "--task films" in refusal_of(sample, *place, "--task", "films")
    message = refusal_of(sample, *place, "--data_dir", tmp_path)
    assert "quora-train.csv" in message and "--para_train" in message
    assert "--para_train no.csv" in refusal_of(sample, *place, "--para_train", "no.csv")
    for source in (tmp_path, small_data / "quora-train.csv"):  # a folder, and what the sample would replace
        message = refusal_of(sample, "--topics", topics, "--out", source, "--data_dir", small_data)
        assert f"--out {source}: is " in message and source.exists()


def test_bad_rows_are_told_once(tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = labelled(tmp_path, small_data, LABELS[:-1] + [""])
    topics = write(tmp_path / "t.txt", "Cats: 3: cat\n")
    sample("--topics", topics, "--para_train", source, "--out", tmp_path / "out.csv")
    assert capsys.readouterr().out.count("topic is empty") == 1
    message = refusal_of(
        sample, "--topics", topics, "--para_train", source, "--out", tmp_path / "o.csv", "--max_bad_rows", 0
    )
    assert "unreadable rows: 1" in message


def test_the_script_has_a_help_of_its_own() -> None:
    done = shell("sample_topics.py", "--help")
    assert done.returncode == 0 and "--topics" in done.stdout and "--para_train" in done.stdout
    assert "--epochs" not in done.stdout
