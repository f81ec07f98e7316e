"""Train and test a multitask minBERT on sentiment, paraphrases and similarity.

python multitask_classifier.py @recipes/small/minilm-cpu.args
python multitask_classifier.py @recipes/r0/g6-yin-yang.args --use_gpu
torchrun --nproc_per_node=8 multitask_classifier.py --use_gpu --amp
python multitask_classifier.py --evaluate best.pt --data_dir data
python multitask_classifier.py --evaluate best.pt --predict x.txt --task sst
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.parser import expand_arguments, parse
from config import EXPORTS
from tasks import TASKS
from utils.console import run_script
from utils.files import probe_file
from utils.packages import check_packages

# torch takes seconds to import: what needs it is imported once the command line is known to be right.
if TYPE_CHECKING:
    from studies.results import Table

SCRIPT = "multitask_classifier.py"


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks."""
    config = parse(argv, TASKS, SCRIPT, str(__doc__))
    draws = config.run.tensorboard and config.run.evaluate is None
    check_packages(*(("tensorboard", "matplotlib") if draws else ()))
    if config.run.predict is not None:
        from evaluation.commands import predict_lines

        predict_lines(config)
        return
    if any(getattr(config.run, name) is not None for name in EXPORTS):
        from evaluation.exports import export

        export(config)
        return
    from training.commands import evaluate, train
    from training.distributed import joined

    with joined(config.compute) as context:
        if config.run.evaluate is not None:
            evaluate(config, context)
            return
        table = benchmark_table(config.run.benchmark) if config.run.benchmark and context.is_main_process else None
        run = train(config, context)
        if table is not None and run is not None:
            from studies.results import benchmark_row

            command = shlex.join(["python", SCRIPT, *expand_arguments(argv)])
            table.add([benchmark_row(run.path, config, command)])


def benchmark_table(file: str) -> "Table":
    """Return the table of --benchmark. Raises UserError, before training, if it cannot be read or written."""
    from studies.results import BENCHMARK_COLUMNS, Table

    table = Table(Path(file), BENCHMARK_COLUMNS)
    probe_file(table.path, "--benchmark")
    table.rows()
    return table


if __name__ == "__main__":
    run_script(main)
