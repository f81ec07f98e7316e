"""Convert pairs of duplicate questions into a training file for --para_extra (R4, section 4.4).

    python data/convert_duplicates.py stackexchange_duplicate_questions.tsv.gz
    python multitask_classifier.py @recipes/r4/bigdata.args

R4 took the first 50,000 pairs of N. Reimers' Stack Exchange duplicates as further positive examples. They are public in
two forms, and both can be read, compressed by gzip or not: lines with two texts and a tab between them
(public.ukp.informatik.tu-darmstadt.de/reimers/sentence-transformers/datasets/paraphrases), and lines with a JSON list
of two texts (stackexchange_duplicate_questions_title_title.jsonl.gz of sentence-transformers/embedding-training-data on
the Hugging Face hub).
"""

import argparse
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path


def read_pair(line: str) -> tuple[str, str] | None:
    """Return the two texts of a line, with white space collapsed; None if it has not two texts."""
    try:
        texts = json.loads(line) if line.startswith("[") else line.split("\t")
    except (ValueError, RecursionError):
        return None
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        return None
    first, second = (" ".join(text.split()) for text in texts)
    return (first, second) if first and second else None


def read_pairs(path: Path) -> Iterator[tuple[str, str] | None]:
    """Yield what `read_pair` returns for each line. Raise OSError, EOFError, ValueError or zlib.error if it is bad."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    opened = gzip.open if compressed else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield read_pair(line)


def convert(source: Path, out: Path, count: int) -> tuple[int, int]:
    """Write the first `count` pairs of `source` as duplicates; return how many there are, and the lines left out."""
    pairs: list[tuple[str, str]] = []
    skipped = 0
    for pair in read_pairs(source):
        if pair is None:
            skipped += 1
        elif len(pairs) < count:
            pairs.append(pair)
        else:
            break
    if pairs:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["", "id", "sentence1", "sentence2", "is_duplicate"])
            writer.writerows([number, f"stackexchange-{number}", *pair, 1] for number, pair in enumerate(pairs))
    return len(pairs), skipped


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description="Convert pairs of duplicate questions into a training file.")
    parser.add_argument("source", type=Path, metavar="FILE", help="pairs, as .tsv or .jsonl, perhaps with .gz")
    where = Path(__file__).parent / "duplicate-questions.csv"
    parser.add_argument("--out", type=Path, default=where, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=50_000, metavar="N", help="number of pairs (default: %(default)s)")
    args = parser.parse_args()
    if args.count < 1:
        parser.exit(2, f"error: --count {args.count} is too small; give at least 1\n")
    try:
        count, skipped = convert(args.source, args.out, args.count)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        parser.exit(2, f"error: {args.source} or --out {args.out}: cannot be used ({error}); name other files\n")
    if not count:
        parser.exit(2, f"error: {args.source}: no line has two texts; name a file of pairs, with tabs or JSON lists\n")
    print(f"{count:,} pairs in {args.out}; {skipped:,} lines without two texts left out")


if __name__ == "__main__":
    main()
