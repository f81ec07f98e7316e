"""--extra_clean: the rule, with real nltk on small data, and checkpoints that clean as in training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, output, read_json, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

import ensemble
import multitask_classifier
from datasets import Examples, TaskData
from models.checkpoint import load, save
from tasks import DEFAULT_TASKS, STS
from text.cleaning import DATA, NEGATIONS, Cleaner, expand_contractions
from text.tokenizer import load_tokenizer
from utils.errors import UserError

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
    """Write the files of WordNet into `folder`: each lemma is a synset, at its true offset in the data file."""
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


def make_nltk_data(folder: Path) -> Path:
    """Write stopwords and WordNet into `folder`, as NLTK_DATA names it, and return it."""
    make_wordnet(folder / "corpora" / "wordnet")
    (folder / "corpora" / "stopwords").mkdir()
    (folder / "corpora" / "stopwords" / "english").write_text(STOPWORDS.replace(" ", "\n") + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only folder in which nltk finds data."""
    import nltk

    folder = make_nltk_data(tmp_path_factory.mktemp("nltk_data"))
    nltk.data.path[:] = [str(folder)]
    return folder


@pytest.fixture(scope="module")
def cleaner(data: Path) -> Cleaner:
    return Cleaner()


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, where nltk is not imported yet."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


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


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=60) | st.lists(st.sampled_from(["n't", "'", "t", " ", "don", "the", "\ud800"])).map("".join)
)
def test_anything_can_be_cleaned(cleaner: Cleaner, text: str) -> None:
    cleaned = cleaner.clean(text)
    assert cleaned == text or cleaned.strip()
    assert not text.strip() or cleaned.strip()


def test_the_fingerprint_follows_stopwords_and_library(
    cleaner: Cleaner, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cleaner.fingerprint
    # Sets have another order in another process, where cleaned texts must be found again.
    code = "from text.cleaning import Cleaner; print(Cleaner().fingerprint)"
    assert python(code, NLTK_DATA=str(data), PYTHONHASHSEED="1").stdout == f"{first}\n"
    other = Cleaner()
    monkeypatch.setattr(other, "_stopwords", other._stopwords | {"film"})
    assert other.fingerprint != first
    monkeypatch.setattr("nltk.__version__", "99.0")
    assert cleaner.fingerprint != first


def test_pairs_are_cleaned_column_by_column(cleaner: Cleaner, tiny_bert: Path) -> None:
    texts = (["The plot isn't good", "The"], ["A good plot", "It works !"])
    cleaned = (["plot not good", "The"], ["good plot", "work"])
    tokenizer = load_tokenizer(tiny_bert, 64)
    for encoding in ("siamese", "cross"):
        raw = Examples(STS, "dev", Path("x"), ["a", "b"], texts, None)
        found = TaskData(raw, tokenizer, encoding, cleaner)
        wanted = TaskData(Examples(STS, "dev", Path("x"), ["a", "b"], cleaned, None), tokenizer, encoding)
        assert found.examples is raw
        for tokens, other in zip(found.tokens, wanted.tokens, strict=True):
            np.testing.assert_array_equal(tokens.input_ids, other.input_ids)
            np.testing.assert_array_equal(tokens.offsets, other.offsets)


def test_checkpoints_clean_as_in_training(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = {name: tmp_path / name / "best.pt" for name in ("clean", "plain")}
    for name, path in checkpoints.items():
        more = ["--extra_clean"] if name == "clean" else []
        multitask_classifier.main([*tiny_flags, *more, "--no_tensorboard", "--run_dir", str(path.parent)])
    content = load(checkpoints["clean"])
    del content["config"]["data"]["extra_clean"]
    save(checkpoints["clean"].with_name("forgotten.pt"), content)  # shows that the flag makes a difference
    checkpoints["forgotten"] = checkpoints["clean"].with_name("forgotten.pt")
    lines = tmp_path / "lines.txt"
    lines.write_text("The plot is n't good\tA good plot\nplot not good\tgood plot\n", encoding="utf-8")
    dev, same = {}, {}
    for name, path in checkpoints.items():
        where = ["--data_dir", str(small_data), "--run_dir", str(tmp_path / f"{name}-again")]
        multitask_classifier.main(["--evaluate", str(path), *where])
        dev[name] = read_json(tmp_path / f"{name}-again" / "scores.json")["dev"]
        words = ["--evaluate", path, "--predict", lines, "--task", "sts"]
        rows = [line.split("\t") for line in output(capsys, multitask_classifier.main, *words).splitlines()]
        assert [row[1] for row in rows] == ["The plot is n't good", "plot not good"]  # texts are printed as given
        same[name] = rows[0][0] == rows[1][0]
    trained = {name: read_json(tmp_path / name / "scores.json")["dev"] for name in ("clean", "plain")}
    assert {name: dev[name] for name in trained} == trained and trained["clean"] != trained["plain"]
    assert dev["forgotten"] != dev["clean"] and same == {"clean": True, "plain": False, "forgotten": False}

    members = [checkpoints["clean"], checkpoints["plain"]]
    flags = ["--data_dir", small_data, "--run_dir", tmp_path / "e", "--cache", tmp_path / "cache"]
    output(capsys, ensemble.main, *members, *flags)
    rows = read_json(tmp_path / "e" / "scores.json")["members"]
    for path, name in zip(members, trained, strict=True):
        for task in DEFAULT_TASKS:
            assert rows[str(path)][task] == pytest.approx(trained[name][task], abs=1e-6)
    message = refusal(lambda: output(capsys, ensemble.main, *members, *flags, "--soup", "uniform"))
    assert "--extra_clean False instead of True" in message


DEAD = "http://127.0.0.1:9"  # nobody listens on this port


def clean_elsewhere(home: Path, nltk_data: str = "") -> tuple[int, str, str]:
    """Clean a sentence with another home folder and without a network; return exit code and output."""
    imports = "from text.cleaning import Cleaner; from utils.console import run_script; "
    code = imports + "run_script(lambda words: print(Cleaner().clean(words[0])))"
    environment = {"HOME": str(home), "NLTK_DATA": nltk_data, "https_proxy": DEAD, "http_proxy": DEAD}
    done = python(code, "The wolves", **environment)
    return done.returncode, done.stdout, done.stderr


def test_missing_data_are_named(tmp_path: Path, data: Path) -> None:
    code, out, errors = clean_elsewhere(tmp_path, str(tmp_path / "here"))
    fetching, line = errors.splitlines()
    assert (code, out, fetching) == (2, "", "fetching nltk's stopwords and wordnet")
    assert line.startswith("error: --extra_clean: nltk's stopwords and wordnet are in none of ")
    for word in (str(tmp_path / "here"), str(tmp_path / "nltk_data"), "NLTK_DATA"):
        assert word in line
    assert "`python -m nltk.downloader stopwords wordnet`" in line
    shutil.copytree(data / "corpora" / "wordnet", tmp_path / "nltk_data" / "corpora" / "wordnet")
    assert "error: --extra_clean: nltk's stopwords are in none of" in clean_elsewhere(tmp_path)[2]


def test_data_are_found_as_the_downloader_leaves_them(tmp_path: Path, data: Path) -> None:
    """It unpacks stopwords and leaves wordnet.zip as it is."""
    corpora = tmp_path / "elsewhere" / "corpora"
    shutil.copytree(data / "corpora" / "stopwords", corpora / "stopwords")
    shutil.make_archive(str(corpora / "wordnet"), "zip", data / "corpora", "wordnet")
    assert clean_elsewhere(tmp_path, str(tmp_path / "elsewhere")) == (0, "wolf\n", "")


@pytest.mark.parametrize("name", DATA)
def test_damaged_data_are_one_line(tmp_path: Path, name: str) -> None:
    folder = make_nltk_data(tmp_path / "nltk_data")
    file = {"stopwords": "stopwords/english", "wordnet": "wordnet/index.noun"}[name]
    (folder / "corpora" / file).write_bytes(b"\xff\xfe 3 x\n")
    code, _, errors = clean_elsewhere(tmp_path)
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"error: --extra_clean: nltk's {name} cannot be read (")


def test_nltk_is_imported_only_with_the_flag(tiny_flags: list[str], data: Path) -> None:
    code = (
        "import sys, multitask_classifier as m\n"
        "for more in ([], ['--extra_clean']):\n"
        "    m.main([*sys.argv[1:], '--dry_run', *more])\n"
        "    print('nltk' in sys.modules)\n"
    )
    done = python(code, *tiny_flags, NLTK_DATA=str(data))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line in ("True", "False")] == ["False", "True"]


def test_without_nltk_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"no package nltk; pip install -r requirements\.txt"):
        Cleaner()
