"""--extra_clean: the rule, on real nltk with small data of its own, and checkpoints that clean as in training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ensemble
import multitask_classifier
from config import Config
from datasets import Examples, TaskData
from models.checkpoint import load, save
from tasks import DEFAULT_TASKS, STS
from text.cleaning import DATA, NEGATIONS, Cleaner, expand_contractions
from text.tokenizer import load_tokenizer
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

# Some of nltk's English stopwords, all of its negations and halves of contractions that matter among them.
STOPWORDS = """i me my we you he she it they this that these am is are was were be been being have has had do does did
a an the and but if or as of at by for with about to from in out on off over under again then once here there when
where why how all any both each few more most other some such no nor not only own same so than too very s t can will
just don don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't isn
isn't it's won won't wouldn wouldn't"""

# A WordNet of these words: part of speech -> lemmas, and its exceptions, form -> lemmas.
LEMMAS = {
    "noun": "film wolf story woman us boss evening box actor thing plot director screenplay city ending",
    "verb": "love run go work be have disappoint feel deliver drag",
    "adj": "good bad happy better funny",
    "adv": "not never well really",
}
EXCEPTIONS = {
    "noun": {"wolves": "wolf", "women": "woman"},
    "verb": {"ran": "run", "went": "go", "gone": "go", "felt": "feel"},
    "adj": {"better": "good well", "happier": "happy", "worse": "bad"},
    "adv": {"better": "well"},
}
POS_LETTER = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


def make_wordnet(folder: Path) -> None:
    """WordNet's own files: every lemma is a synset by itself, at its true offset in the data file."""
    folder.mkdir(parents=True)
    files = {"lexnames": "00\tadj.all\t3\n", "index.sense": "", "cntlist.rev": ""}
    for number, (pos, lemmas) in enumerate(LEMMAS.items(), start=1):
        letter = POS_LETTER[pos]
        data, index = "  1 WordNet 3.0 Copyright 2006: not a line of it\n", "  1 A header line.\n"
        for lemma in sorted(lemmas.split()):
            offset = len(data)
            data += f"{offset:08d} 00 {letter} 01 {lemma} 0 000 {'00 ' if pos == 'verb' else ''}| what it means  \n"
            index += f"{lemma} {letter} 1 0 1 0 {offset:08d}  \n"
            files["index.sense"] += f"{lemma}%{number}:00:00:: {offset:08d} 1 0\n"
        exceptions = "".join(f"{form} {lemmas}\n" for form, lemmas in sorted(EXCEPTIONS[pos].items()))
        files |= {f"data.{pos}": data, f"index.{pos}": index, f"{pos}.exc": exceptions}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def make_data(folder: Path) -> Path:
    """A folder as NLTK_DATA names it."""
    make_wordnet(folder / "corpora" / "wordnet")
    (folder / "corpora" / "stopwords").mkdir()
    (folder / "corpora" / "stopwords" / "english").write_text(STOPWORDS.replace(" ", "\n") + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def data(nltk_data: Path) -> Path:
    """The small data, without which no test here can do."""
    return nltk_data


@pytest.fixture(scope="module")
def cleaner(data: Path) -> Cleaner:
    return Cleaner()


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("it does n't work", "it does not work"),
        ("it doesn't work", "it does not work"),
        ("it doesn\u2019t work", "it does not work"),
        ("it doesnt work", "it does not work"),
        ("it doesn t work", "it does not work"),
        ("i ca n't , i can't , i cant , i cannot", "i can not , i can not , i can not , i can not"),
        ("you wo n't and sha n't", "you will not and shall not"),
        ("it ain't so", "it is not so"),
        ("you oughtn't", "you ought not"),
        ("we'll say they 'd go", "we will say they would go"),
        ("i 'm sure you're right , they 've won", "i am sure you are right , they have won"),
        ("the film 's end", "the film  end"),
        ("don is a donut , the cantor wonted to want it", "don is a donut , the cantor wonted to want it"),
        ("isn t20 cricket fun", "isn t20 cricket fun"),
        ("o ' n't '' 'x'", "o ' not '' 'x'"),
    ],
)
def test_contractions(text: str, wanted: str) -> None:
    assert expand_contractions(text) == wanted


AUXILIARIES = "are could did do does had has have is might must need should was were would"


@pytest.mark.parametrize("end", ["n't", " n't", "nt", "n t", *(f"n{mark}t" for mark in "\u2018\u2019\u02bc\u00b4`")])
def test_every_negated_verb_however_it_is_written(end: str) -> None:
    stems = {word: word for word in AUXILIARIES.split()} | {"ai": "is", "ca": "can", "sha": "shall", "wo": "will"}
    for stem, verb in stems.items():
        assert expand_contractions(f"they {stem}{end} go") == f"they {verb} not go"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The wolves ran , and the WOMEN went with them .", "wolf run woman go them"),
        ("This isn't a good film !", "not good film"),
        ("This is n't a good film !", "not good film"),
        ("Don't go", "not go"),
        ("It doesn\u2019t work", "not work"),
        ("no story , nor plot ; not ever", "no story nor plot not ever"),
        ("I can't say that it works", "not say work"),
        ("never better", "never better"),  # a lemma as it is: WordNet has better as an adjective
        ("happier cities , worse boxes", "happy city bad box"),
        ("us bosses , this evening", "us boss evening"),  # morphy of a noun, not its shortest form, u, bos or even
        ("loved by actors", "love actor"),
        ("xqzt 3.5 caf\u00e9s C++", "xqzt 3 5 caf\u00e9s c"),
        ("under_score/slash-dash", "score slash dash"),
    ],
)
def test_clean(cleaner: Cleaner, text: str, wanted: str) -> None:
    assert cleaner.clean(text) == wanted


@pytest.mark.parametrize("text", ["The", "It is .", "!!! ...", "\u2014", "is it the one's", "?"])
def test_a_text_of_nothing_but_stopwords_stays_as_it_was(cleaner: Cleaner, text: str) -> None:
    assert cleaner.clean(text) == (text if "one" not in text else "one")


def test_negations_are_among_nltks_stopwords_and_stay(cleaner: Cleaner) -> None:
    assert set(STOPWORDS.split()) > NEGATIONS
    for word in STOPWORDS.split():
        film, *kept, plot = cleaner.clean(f"film {word} plot").split()
        assert (word in kept) == (word in NEGATIONS) and ("not" in kept) == (word == "not" or word.endswith("n't"))


def test_lemmas_are_nltks_own(cleaner: Cleaner) -> None:
    from nltk.stem import WordNetLemmatizer

    words = {form for lemmas in LEMMAS.values() for word in lemmas.split() for form in (word, f"{word}s", f"{word}ed")}
    words |= {form for exceptions in EXCEPTIONS.values() for form in exceptions}
    changed = 0
    for word in words - set(STOPWORDS.split()):
        wanted = WordNetLemmatizer().morphy(word) or word
        assert cleaner.clean(word) == wanted
        changed += word != wanted
    assert changed > 20


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=60) | st.lists(st.sampled_from(["n't", "'", "t", " ", "don", "the", "\ud800"])).map("".join)
)
def test_anything_can_be_cleaned(cleaner: Cleaner, text: str) -> None:
    cleaned = cleaner.clean(text)
    assert cleaned == text or cleaned.strip()
    assert not text.strip() or cleaned.strip()


def test_the_fingerprint_follows_stopwords_and_library(cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cleaner.fingerprint
    assert first == Cleaner().fingerprint
    other = Cleaner()
    monkeypatch.setattr(other, "_stopwords", other._stopwords | {"film"})
    assert other.fingerprint != first
    monkeypatch.setattr("nltk.__version__", "99.0")
    assert cleaner.fingerprint != first


def test_the_fingerprint_is_that_of_other_processes(cleaner: Cleaner, data: Path) -> None:
    """Where sets have another order; else nothing that was cleaned would be found again."""
    code = "from text import cleaning; print(cleaning.Cleaner().fingerprint)"
    done = python(code, NLTK_DATA=str(data), PYTHONHASHSEED="1")
    assert done.stdout == f"{cleaner.fingerprint}\n", done.stderr


def test_pairs_are_cleaned_column_by_column(cleaner: Cleaner, tiny_bert: Path) -> None:
    texts = (["The plot isn't good", "The"], ["A good plot", "It works !"])
    cleaned = (["plot not good", "The"], ["good plot", "work"])
    tokenizer = load_tokenizer(tiny_bert, 64)
    for encoding in ("siamese", "cross"):
        raw = Examples(STS, "dev", Path("x"), ["a", "b"], texts, None)
        found = TaskData(raw, tokenizer, encoding, cleaner)
        wanted = TaskData(Examples(STS, "dev", Path("x"), ["a", "b"], cleaned, None), tokenizer, encoding)
        assert found.examples is raw
        for own, other in zip(found.tokens, wanted.tokens, strict=True):
            np.testing.assert_array_equal(own.input_ids, other.input_ids)
            np.testing.assert_array_equal(own.offsets, other.offsets)


# ------------------------------------------------------------------------------- checkpoints clean as they were trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], data: Path) -> Path:
    """A folder with a run `clean` and a run `plain` that differ in the one flag."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"clean": ["--extra_clean"], "plain": []}.items():
        multitask_classifier.main([*tiny_flags, *flags, "--no_tensorboard", "--run_dir", str(folder / name)])
    return folder


def scores(folder: Path) -> Any:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))["dev"]


def predictions(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (folder / "predictions").iterdir()}


def without_the_flag(path: Path, out: Path) -> Path:
    """The same checkpoint as one from before the flag was known."""
    content = load(path)
    assert content["config"]["data"].pop("extra_clean") is True
    save(out, content)
    return out


def test_the_flag_is_in_the_checkpoint(runs: Path) -> None:
    for name, wanted in (("clean", True), ("plain", False)):
        assert Config.from_dict(load(runs / name / "best.pt")["config"]).data.extra_clean is wanted


def test_evaluation_cleans_as_in_training(runs: Path, small_data: Path, tmp_path: Path) -> None:
    for name, checkpoint in {
        "clean": runs / "clean" / "best.pt",
        "plain": runs / "plain" / "best.pt",
        "forgotten": without_the_flag(runs / "clean" / "best.pt", tmp_path / "old.pt"),
    }.items():
        out = tmp_path / name
        flags = ["--evaluate", checkpoint, "--data_dir", small_data, "--run_dir", out, "--threads", 1]
        multitask_classifier.main([str(flag) for flag in flags])
    for name in ("clean", "plain"):
        assert scores(tmp_path / name) == scores(runs / name)
        assert predictions(tmp_path / name) == predictions(runs / name)
    assert predictions(tmp_path / "forgotten") != predictions(runs / "clean")  # so that forgetting it would show


def test_prediction_cleans_as_in_training(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("The plot is n't good\tA good plot\nplot not good\tgood plot\n", encoding="utf-8")

    def similarities(checkpoint: Path) -> list[str]:
        capsys.readouterr()
        multitask_classifier.main(["--evaluate", str(checkpoint), "--predict", str(lines), "--task", "sts"])
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [row[1] for row in rows] == ["The plot is n't good", "plot not good"]  # as they were given
        return [row[0] for row in rows]

    first, second = similarities(runs / "clean" / "best.pt")
    assert first == second
    first, second = similarities(without_the_flag(runs / "clean" / "best.pt", tmp_path / "old.pt"))
    assert first != second


def test_members_of_one_ensemble_may_differ(runs: Path, small_data: Path, tmp_path: Path) -> None:
    members = [str(runs / name / "best.pt") for name in ("clean", "plain")]
    flags = ["--data_dir", small_data, "--run_dir", tmp_path / "e", "--cache", tmp_path / "cache", "--threads", 1]
    ensemble.main([*members, *(str(flag) for flag in flags)])
    rows = json.loads((tmp_path / "e" / "scores.json").read_text(encoding="utf-8"))["members"]
    for member, name in zip(members, ("clean", "plain"), strict=True):
        for task in DEFAULT_TASKS:
            assert rows[member][task] == pytest.approx(scores(runs / name)[task], abs=1e-6)
    assert scores(runs / "clean") != scores(runs / "plain")


def test_weights_of_both_kinds_are_not_averaged(runs: Path, small_data: Path, tmp_path: Path) -> None:
    members = [str(runs / name / "best.pt") for name in ("clean", "plain")]
    with pytest.raises(UserError, match="--extra_clean False instead of True"):
        ensemble.main([*members, "--soup", "uniform", "--data_dir", str(small_data), "--run_dir", str(tmp_path / "e")])


# ------------------------------------------------------------------------------------------------ where nltk is lacking


DEAD = "http://127.0.0.1:9"  # nobody listens on this port


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own in the repository, where nltk is not imported yet."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def clean_elsewhere(home: Path, nltk_data: str = "") -> subprocess.CompletedProcess[str]:
    """Clean a sentence with another home and without a network."""
    imports = "from text.cleaning import Cleaner; from utils.console import run_script; "
    code = imports + "run_script(lambda words: print(Cleaner().clean(words[0])))"
    environment = {"HOME": str(home), "NLTK_DATA": nltk_data, "https_proxy": DEAD, "http_proxy": DEAD}
    return python(code, "The wolves", **environment)


def test_missing_data_are_one_line(tmp_path: Path) -> None:
    done = clean_elsewhere(tmp_path, str(tmp_path / "here"))
    assert done.returncode == 2 and done.stdout == ""
    fetching, line = done.stderr.splitlines()
    assert fetching == "fetching nltk's stopwords and wordnet"
    assert line.startswith("error: --extra_clean: nltk's stopwords and wordnet are in none of ")
    for word in (str(tmp_path / "here"), str(tmp_path / "nltk_data"), "NLTK_DATA"):
        assert word in line
    assert "`python -m nltk.downloader stopwords wordnet`" in line


def test_only_what_is_missing_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "nltk_data" / "corpora").mkdir(parents=True)
    shutil.copytree(data / "corpora" / "wordnet", tmp_path / "nltk_data" / "corpora" / "wordnet")
    done = clean_elsewhere(tmp_path)
    assert done.returncode == 2 and "error: --extra_clean: nltk's stopwords are in none of" in done.stderr


def test_data_are_found_as_the_downloader_leaves_them(tmp_path: Path, data: Path) -> None:
    """It unpacks stopwords and leaves wordnet.zip as it is."""
    corpora = tmp_path / "elsewhere" / "corpora"
    shutil.copytree(data / "corpora" / "stopwords", corpora / "stopwords")
    shutil.make_archive(str(corpora / "wordnet"), "zip", data / "corpora", "wordnet")
    done = clean_elsewhere(tmp_path, str(tmp_path / "elsewhere"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "wolf\n", "")


@pytest.mark.parametrize("name", DATA)
def test_damaged_data_are_one_line(tmp_path: Path, name: str) -> None:
    folder = make_data(tmp_path / "nltk_data")
    file = {"stopwords": "stopwords/english", "wordnet": "wordnet/index.noun"}[name]
    (folder / "corpora" / file).write_bytes(b"\xff\xfe 3 x\n")
    done = clean_elsewhere(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --extra_clean: nltk's {name} cannot be read (")


def test_nltk_is_imported_only_when_it_is_asked_for(tiny_flags: list[str], data: Path) -> None:
    code = (
        "import sys, multitask_classifier as m\n"
        "m.main([*sys.argv[1:], '--dry_run'])\n"
        "print('nltk' in sys.modules)\n"
        "m.main([*sys.argv[1:], '--dry_run', '--extra_clean'])\n"
        "print('nltk' in sys.modules)\n"
    )
    done = python(code, *tiny_flags, NLTK_DATA=str(data))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line in ("True", "False")] == ["False", "True"]


def test_nltk_itself_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"no package nltk; pip install -r requirements\.txt"):
        Cleaner()
