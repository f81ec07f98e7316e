"""The device of a run, its precision and its memory."""

import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch

from utils.errors import UserError

# How many kernels oneDNN keeps: it compiles one of up to 3 MB for each shape of a product. A training step needs about
# 20, but each packed batch has new shapes, so oneDNN's default of 1024 would take gigabytes.
KERNELS = 64


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model of the CPU where Linux tells it, and otherwise its architecture."""
    with suppress(OSError):
        if model := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE):
            return model[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Device:
    """The device of a run. `amp` is the type of autocast or None; `scaled` says that fp16 gradients need a scaler."""

    device: torch.device
    amp: torch.dtype | None = None
    scaled: bool = False

    @property
    def name(self) -> str:
        """The name of the hardware, for tables and checkpoints."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({processor_name()}, {torch.get_num_threads()} threads)"

    def autocast(self) -> torch.autocast:
        """Return a context that computes in the precision of the run."""
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def synchronize(self) -> None:
        """Wait until the device has finished all its work; call this before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Restart the count of `peak_memory`, if the system can do that."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """Return the largest number of bytes that tensors took on a GPU, or the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_peak()

    def free_memory(self) -> int:
        """Return how many bytes are free on a GPU, or how many more this process can take of main memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return free_memory()

    def utilization(self) -> int | None:
        """Return in how many percent of the last fraction of a second a GPU was at work.

        The driver answers, so nothing waits for the device. Return None for other devices, and where the driver does
        not say or the package nvidia-ml-py, which asks it, is missing.
        """
        if self.device.type != "cuda":
            return None
        try:
            return torch.cuda.utilization(self.device)
        except Exception:  # the package has errors of its own, which cannot be named without it
            return None


def process_peak() -> int:
    """Return the largest number of bytes of main memory that this process took."""
    try:
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    except (OSError, IndexError):  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def memory_limits(root: Path) -> Iterator[int]:
    """Yield the limits in bytes that control groups, of version 1 or 2, set for this process."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        folder = root / "sys/fs/cgroup" / kinds
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        if kinds in ("", "memory"):
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                file = folder / group.relative_to("/") / name
                text = file.read_text().strip() if file.is_file() else ""
                if text.isdigit():  # else "max"
                    yield int(text)


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes of main memory this process can still take, also in a container or a batch job.

    If the system does not say, return half of the machine's memory. `root` is the folder of /proc and /sys.
    """
    try:
        available = re.search(r"MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text())
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert available
        return max(0, min([int(available[1]) * 1024, *(limit - used for limit in memory_limits(root))]))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of the random generator of `device`, which dropout uses."""
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore a state that `random_state` returned."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout on `device` draws from."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)  # of the GPU that this process has chosen
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def cpu_has_bf16() -> bool:
    """Return whether the CPU has instructions that multiply bf16; emulated bf16 is slower than fp32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def has_bf16(kind: str) -> bool:
    """Return whether devices of a kind multiply bf16 fast."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_has_bf16()


def why_no_gpu() -> str:
    """Return why torch finds no GPU, and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch {torch.__version__} is a build for CPUs alone"
    return f"this torch {torch.__version__} is a build for GPUs, so see whether nvidia-smi lists one"


class DeviceOptions(Protocol):
    """What of the flags decides about the device."""

    use_gpu: bool
    amp: bool
    threads: int | None
    amp_dtype: str
    tf32: bool


def device_of(options: DeviceOptions, say: Callable[[str], None]) -> Device:
    """Return what `choose_device` returns for these options, and allow TF32 or not as --tf32 says."""
    device = choose_device(options.use_gpu, options.amp, options.threads, say, options.amp_dtype)
    has_tf32 = device.device.type == "cuda" and torch.cuda.is_tf32_supported()
    if options.tf32 and not has_tf32:
        say(f"--tf32: this {device.device.type} has no TF32; products of fp32 stay exact")
    torch.backends.cuda.matmul.allow_tf32 = options.tf32 and has_tf32
    return device


@contextmanager
def without_tf32(active: bool) -> Iterator[None]:
    """Keep products of fp32 exact inside if `active`, even with --tf32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed and not active
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def choose_device(
    use_gpu: bool, amp: bool, threads: int | None, say: Callable[[str], None], amp_dtype: str = "auto"
) -> Device:
    """Return what --use_gpu, --amp and --threads ask for, as far as this machine has it, and set the threads.

    `say` gets a line for each thing that is missing, and one for a GPU that is not used. Of several GPUs, the current
    one of this process is taken. Raises UserError if the device lacks the type that --amp_dtype names.
    """
    if threads:
        torch.set_num_threads(threads)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(cache, str(KERNELS))
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = found if use_gpu else "cpu"
    if use_gpu and found == "cpu":
        say(f"--use_gpu: there is no cuda or mps device here, so the CPU works; {why_no_gpu()}")
    elif found != kind:
        say("using the CPU, although this machine has a GPU; --use_gpu uses it")
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    if amp_dtype != "auto" and not amp:
        raise UserError(f"--amp_dtype {amp_dtype} is the type of --amp; add that or drop it")
    if not amp:
        return Device(device)
    bf16, fp16 = has_bf16(kind), kind == "cuda"
    if not {"auto": True, "bf16": bf16, "fp16": fp16}[amp_dtype]:
        raise UserError(f"--amp_dtype {amp_dtype}: this {kind} has no fast {amp_dtype}; use auto or another device")
    if bf16 and amp_dtype != "fp16":
        return Device(device, torch.bfloat16)
    if fp16:
        return Device(device, torch.float16, scaled=True)
    say(f"--amp: this {kind} has no fast half precision; mixed precision is off")
    return Device(device)
