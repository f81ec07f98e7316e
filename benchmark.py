"""Measure the speed and memory of training and evaluation, side by side with transformers.

    python benchmark.py
    python benchmark.py --tasks sst,sts --modes train --steps 40 --data_dir data
    python benchmark.py --modes tokenise,frozen,start
    python benchmark.py --modes scaling --ranks 1,2,4,8 --use_gpu --amp
    python benchmark.py --use_gpu --amp --cuda_graphs --block 10 --pretrained random-bert-base --data_dir made

The peer is what most people write with transformers: batches padded to their longest text, SDPA attention and torch's
fused AdamW. Further rows of the table have stronger peers: on a CPU batches grouped by length, in fp32 and in bf16; on
a GPU sequences without padding, by varlen FlashAttention and torch.compile. `--comparisons full-model` leaves them out.

Two names need no network: `--pretrained random-bert-base` has random weights of BERT-base's shape, and
`--data_dir made` has texts of random words with the lengths of the real ones.

Some modes have no peer:
- tokenise reads and tokenises a generated file of Quora's size, first without a cache and then with it.
- frozen trains the heads of a frozen backbone, with --cache_frozen and without, in turn.
- start times the training script's --help and a short run of it.
- optimizer compares our optimizers with torch's.
- recipe adds up R0's Yin Yang recipe from the seconds of its steps.
- scaling trains in several processes that share each batch. Each process has --threads threads.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import BenchmarkOptions
from cli.parser import build_parser, expand_arguments, groups_of
from utils.console import run_script
from utils.errors import UserError
from utils.files import probe_folder
from utils.packages import check_packages


def main(argv: Sequence[str]) -> None:
    """Measure what the command line asks for.

    Exits with code 2 for a flag or value that does not exist. Raises UserError for --ranks that are no numbers and for
    an --out that cannot be written.
    """
    groups = {"benchmark": BenchmarkOptions}
    parser = build_parser("benchmark.py", str(__doc__).split("\n\n")[0], {}, groups)
    options: BenchmarkOptions = groups_of(vars(parser.parse_args(expand_arguments(argv))), groups)["benchmark"]
    if not all(ranks.isdecimal() and int(ranks) for ranks in options.ranks):
        raise UserError(f"--ranks {','.join(options.ranks)}: give numbers of processes, such as 1,2")
    probe_folder(Path(options.out), "--out")
    check_packages()
    from benchmarks.modes import run  # torch takes seconds to import, and the command line is right now

    run(options)


if __name__ == "__main__":
    run_script(main)
