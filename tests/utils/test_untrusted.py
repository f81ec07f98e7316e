"""How foreign texts are shown, and the kinds of values that files must have."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from utils.schema import ANY, METRICS, check
from utils.untrusted import MAX_SHOWN, MAX_WORD, parse_json, read_bytes, shown


def test_a_foreign_text_is_one_short_line() -> None:
    for text, wanted in {
        "a plain text, \u00e4\u00f6\u6f22": "a plain text, \u00e4\u00f6\u6f22",
        "\x1b[2J\x9b1m": r"\x1b[2J\x9b1m",
        "a\nerror: b\r\tc\u2028d": r"a\nerror: b\r\tc\u2028d",
        "\u202egnp.exe \udc80\0": r"\u202egnp.exe \udc80\x00",
    }.items():
        assert shown(text) == wanted == shown(wanted) == str(UserError(text))
    assert shown("a\n\tb\x1b" + "c" * 9999, None) == "a\n\tb\\x1b" + "c" * 9999
    for text in ("9" * 5000, "x " * 50_000, "\x1b" * 50_000):
        assert len(shown(f"begin {text} end")) <= MAX_SHOWN and shown(f"begin {text} end").endswith(" end")
    assert len(shown("9" * 5000)) <= MAX_WORD


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:geheim@host:5432/db", "mysql+pymysql://me:ge/heim@x:geheim@host/db", "redis://:geheim@host",
        "postgresql://host/db?user=me&password=geheim", "postgresql://host/db?user=me&sslpassword=geheim&x=1",
    ],
)  # fmt: skip
def test_passwords_are_left_out(url: str) -> None:
    for text in (url, f"--storage {url}: no such host", f"could not parse '{url}'"):
        for limit in (MAX_SHOWN, None):
            assert "heim" not in shown(text, limit) and "***" in shown(text, limit)
    kept = "file sqlite:////a/b.db, https://x.org:80/y and a mail to me@x.org"
    assert shown(kept) == kept


def test_values_of_another_kind_are_named() -> None:
    line: dict[str, Any] = {"epoch": 1, "train": {"sst": {"loss": 0.5}}, "dev": {"score": 1, "sst": {"accuracy": 1.0}}}
    assert check({**line, "more": None}, METRICS, "it") == {**line, "more": None}
    for changes, word in (
        ({"epoch": 1.0}, "epoch"), ({"epoch": True}, "epoch"), ({"train": []}, "train"),
        ({"dev": {"score": "1"}}, "score"), ({"dev": {"score": float("nan")}}, "score"),
        ({"dev": {"sst": {"accuracy": 10**400}}}, "accuracy"),
        ({"train": {5: {}}}, "train"), ({"trainable_parameters": None}, "trainable_parameters"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            check({**line, **changes}, METRICS, "it")
    with pytest.raises(ValueError, match="it lacks dev"):
        check({"epoch": 1, "train": {}}, METRICS, "it")
    for value, kind in (([1, "a"], [int]), ((1.0,), (float, float)), (None, {ANY: int})):
        with pytest.raises(ValueError, match="it"):
            check(value, kind, "it")


def test_numbers_without_end_are_refused_in_json() -> None:
    assert parse_json('{"a": [1, -123456789012345678901234567890, 1e99]}')["a"][1] < 0
    for digits in (41, 4000, 10_000):
        with pytest.raises(ValueError, match="digits"):
            parse_json('{"a": ' + "9" * digits + "}")


def test_a_bound_asks_for_no_memory(tmp_path: Path) -> None:
    """A file of four bytes needs no more memory where a file may have a gigabyte."""
    path = tmp_path / "small"
    path.write_bytes(b"text")
    tracemalloc.start()
    try:
        assert read_bytes(path, 1 << 30) == b"text"
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="larger"):
        read_bytes(path, 3)
