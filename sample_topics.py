"""Draw a sample of a task's training file with an exact number of examples of each topic (R2, 5.3.4 and A.1).

    python sample_topics.py --topics recipes/r2/topics.txt --data_dir data --out data/quora-topics.csv
    python multitask_classifier.py @recipes/r2/sampled.args --data_dir data

Each line of --topics is a topic: its name, its number of examples, and words that describe it, as in
`Finance: 600: money, bank, loans`. An example belongs to the topic whose words are nearest to its texts, by the mean
embeddings of --pretrained. Labels of another classifier can be used instead: those of --labels, or a column `topic` of
the training file. --out has this column too. R2 asked BART, about the first questions for example:

    import json
    from transformers import pipeline
    classify = pipeline("zero-shot-classification", model="facebook/bart-large-mnli", device=0)
    with open("topics.jsonl", "w") as file:
        file.writelines(json.dumps(found) + "\\n" for found in classify(questions, names_of_topics))

and then --labels topics.jsonl.

--seed alone decides which examples of a topic are drawn. The quota of one topic does not change the draw of another.
The sample is an ordinary training file. Its examples are in the order of the original file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, FileOptions, TaskOptions, TrainOptions, option
from tasks import TASKS, Task, task_by_alias
from utils.console import format_table, run_script, say
from utils.errors import UserError
from utils.files import probe_file, write_text
from utils.packages import check_packages


@dataclass
class TopicOptions:
    """Topics."""

    topics: str = option(
        "", "file with a line for each topic: NAME: COUNT: WORDS, such as Finance: 600: money, bank", metavar="FILE"
    )
    labels: str | None = option(
        None,
        "what transformers' pipeline zero-shot-classification says of each first text, or of both texts with a space "
        "between them: json lines, or a list, of sequence, labels and scores",
        metavar="FILE",
    )
    out: str = option("", "file to write the sample into, a training file for --NAME_train", metavar="FILE")
    task: str = option("para", "task whose training file is sampled", metavar="NAME")
    pretrained: str = option(
        "bert-base-uncased",
        "model whose embeddings find the topics: all-MiniLM-L6-v2, another name of the hub, or a folder",
        metavar="NAME",
    )
    seed: int = option(TrainOptions.seed, "seed of the draw", low=0)


def main(argv: Sequence[str]) -> None:
    """Parse the command line, then write the sample."""
    groups = {"data": FileOptions, "topics": TopicOptions, "compute": ComputeOptions}
    parser = build_parser("sample_topics.py", str(__doc__).split("\n\n")[0], TASKS, groups, ("train",))
    given = vars(parser.parse_args(expand_arguments(argv)))
    options = groups_of(given, groups)
    for flag in ("topics", "out"):
        if not getattr(options["topics"], flag):
            raise UserError(f"--{flag} is missing; name a file")
    names = task_by_alias(TASKS)
    if options["topics"].task not in names:
        raise UserError(f"--task {options['topics'].task} is none of {', '.join(names)}")
    task = TASKS[names[options["topics"].task]]
    write_sample(options["topics"], task, options["data"], task_options(given, task), options["compute"])


def write_sample(
    options: TopicOptions, task: Task, data: FileOptions, files: TaskOptions, compute: ComputeOptions
) -> None:
    """Write the sample of a task's training file, and print how many examples each topic has.

    Raise UserError if a file cannot be used or a quota cannot be filled.
    """
    check_packages()
    # torch takes seconds to import, so this comes after the command line is known to be right.
    from studies.topics import (
        assign_topics,
        draw,
        format_training_file,
        labelled_topics,
        read_labels,
        read_topics,
        read_training_file,
    )

    topics, out = read_topics(Path(options.topics)), Path(options.out)
    labels = None if options.labels is None else read_labels(Path(options.labels))
    examples, names = read_training_file(data, files, task, out)
    probe_file(out, "--out")
    if labels is not None:
        names = labelled_topics(examples, labels)
    elif names is None:
        names = assign_topics(examples, topics, options.pretrained, compute)
    chosen = draw(names, topics, options.seed)
    write_text(out, format_training_file(examples.at(chosen), names[chosen]))
    rows = [[name, f"{(names == name).sum():,}", f"{topic.quota:,}"] for name, topic in topics.items()]
    say(format_table(["topic", "examples", "drawn"], [*rows, ["all", f"{len(examples):,}", f"{len(chosen):,}"]]))
    say(f"sample in {out}: train with --{task.name}_train {out}")


if __name__ == "__main__":
    run_script(main)
