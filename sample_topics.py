"""Draw a sample of a task's training file with an exact number of examples of each topic (R2, 5.3.4 and A.1).

    python sample_topics.py --topics recipes/r2/topics.txt --data_dir data --out data/quora-topics.csv
    python multitask_classifier.py @recipes/r2/sampled.args --data_dir data

Each line of --topics is a topic: its name, its number of examples, and words that describe it, as in
`Finance: 600: money, bank, loans`. An example belongs to the topic whose words are nearest to its texts, by the mean
embeddings of --pretrained. If the training file has a column `topic`, its entries are used instead of a model, so that
labels of another classifier can be used (R2 used BART). --out has this column too.

--seed alone decides which examples of a topic are drawn. The quota of one topic does not change the draw of another.
The sample is an ordinary training file. Its examples are in the order of the original file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, FileOptions, TrainOptions, option
from tasks import TASKS, task_by_alias
from utils.console import run_script
from utils.errors import UserError


@dataclass
class TopicOptions:
    """Topics."""

    topics: str | None = option(
        None, "file with a line for each topic: NAME: COUNT: WORDS, such as Finance: 600: money, bank", metavar="FILE"
    )
    out: str | None = option(None, "file to write the sample into, a training file for --NAME_train", metavar="FILE")
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
    topic_options: TopicOptions = options["topics"]
    if topic_options.topics is None:
        raise UserError("--topics is missing; name a file")
    if topic_options.out is None:
        raise UserError("--out is missing; name a file")
    task_names = task_by_alias(TASKS)
    if topic_options.task not in task_names:
        raise UserError(f"--task {topic_options.task} is none of {', '.join(task_names)}")
    task = TASKS[task_names[topic_options.task]]

    # torch takes seconds to import, so this comes after the command line is known to be right.
    from studies.topics import write_sample

    write_sample(
        topics_path=Path(topic_options.topics),
        out=Path(topic_options.out),
        task=task,
        data=options["data"],
        options=task_options(given, task),
        pretrained=topic_options.pretrained,
        compute=options["compute"],
        seed=topic_options.seed,
    )


if __name__ == "__main__":
    run_script(main)
