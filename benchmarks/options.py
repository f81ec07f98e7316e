"""The options of benchmark.py."""

from dataclasses import dataclass

from config import MAX_THREADS, option
from tasks import DEFAULT_TASKS, TASKS

PEER_MODES = ("train", "eval")
SOLO_MODES = ("tokenise", "frozen", "start", "optimizer", "recipe", "scaling")  # modes without a peer
STRONG_PEERS = {"cpu": ("grouped", "grouped-bf16"), "cuda": ("varlen",), "mps": ()}  # by the device
ADAPTER_NAMES = ("lora", "dora", "lora-over-full", "dora-over-lora")
COMPARISON_NAMES = ("full-model", "strong", "grouped", "grouped-bf16", "varlen", *ADAPTER_NAMES)
RANDOM_BERT = "random-bert-base"  # the --pretrained that stands for random weights of BERT-base's shape
GENERATED = "made"  # the --data_dir that stands for generated files


@dataclass
class BenchmarkOptions:
    """Benchmark."""

    comparisons: tuple[str, ...] = option(
        ("full-model", "strong"),
        "comma-separated comparisons; each has a peer's side and ours. strong: grouped (batches of equal "
        "lengths) and grouped-bf16 (both sides in bf16) on a CPU, varlen (no padding, compiled) on a GPU",
        choices=COMPARISON_NAMES,
    )
    tasks: tuple[str, ...] = option(tuple(DEFAULT_TASKS), "comma-separated tasks", choices=tuple(TASKS))
    modes: tuple[str, ...] = option(
        PEER_MODES,
        "comma-separated: train, eval; tokenise a large file; frozen, with its cache and without; start of a run; "
        "recipe; the optimizer alone; scaling over --ranks",
        choices=(*PEER_MODES, *SOLO_MODES),
    )
    batch_size: int = option(64, "examples per step", low=1)
    steps: int = option(20, "timed rounds of each side: training steps, or passes over dev", low=1)
    warmup: int = option(3, "rounds of each side before the timed ones", low=0)
    threads: int = option(2, "CPU threads", low=1, high=MAX_THREADS)
    ranks: tuple[str, ...] = option(("1", "2"), "comma-separated process counts for --modes scaling", metavar="NUMBERS")
    data_dir: str = option(
        "data/sample", f"folder of the csv files; {GENERATED}: generated files of random words", metavar="DIR"
    )
    pretrained: str = option(
        "all-MiniLM-L6-v2", f"weights: bert-base-uncased, another hub name, a folder, or {RANDOM_BERT}", metavar="NAME"
    )
    out: str = option("benchmarks/results", "folder of the results", metavar="DIR")
    use_gpu: bool = option(False, "use cuda, else mps, else warn and use the CPU")
    amp: bool = option(False, "automatic mixed precision: bf16 where the device has it, else fp16 with a scaler")
    cuda_graphs: bool = option(False, "replay our steps from CUDA graphs")
    block: int = option(1, "training steps in a round; after each round the clock waits for the GPU", low=1)
    loader_workers: int = option(0, "processes that make the peer's batches", low=0)

    @property
    def training_steps(self) -> int:
        """Return the number of training steps of each side, warmup included."""
        return self.block * (self.warmup + self.steps)
