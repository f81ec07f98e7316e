"""A CUDA device for machines that have none: `make gpu-rehearsal` runs the GPU's tests on it, slowly.

simulated_gpu.cpp gives torch a device of type "cuda" that computes on the CPU, and this module gives it what torch.cuda
offers: streams (without any time of their own), graphs (which hold addresses, sizes and numbers, as CUDA's do), errors
where the host would wait, and the kernels of attention by their formula. It shows wrong devices and types, waits, and
what a graph may not bake in. It knows nothing of speed, of kernels' own rounding, or of streams that do not wait for
each other.

`python tests/simulated_gpu.py FOLDER` compiles it; a run of pytest loads it by `-p simulated_gpu` with FOLDER in
SIMULATED_GPU. It follows the inside of the pinned torch, so that another one may need other lines here.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

NAME = "simulated_gpu_device"
LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")


def torch_folder() -> Path:
    """Where torch is, which must not be imported yet."""
    for folder in map(Path, sys.path):
        if (folder / "torch" / "lib").is_dir():
            return folder / "torch"
    raise ModuleNotFoundError("torch is not installed")


def compile_device(folder: Path) -> None:
    """Write the device's library into `folder`, where it is older than its source. Needs g++."""
    source, library = Path(__file__).with_suffix(".cpp"), folder / f"{NAME}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch = torch_folder()
    headers = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-DTORCH_EXTENSION_NAME={NAME}", str(source)]
    command += [word for own in headers for word in ("-isystem", str(own))]
    command += [f"-L{torch / 'lib'}", *(f"-l{own}" for own in LIBRARIES), "-o", str(library)]
    subprocess.run(command, check=True)


def load_device(folder: Path) -> Any:
    """The library as a module. It must be there before torch asks for the first time whether there is a GPU."""
    assert "torch" not in sys.modules, "the simulated GPU must come before torch"
    for library in ("torch_global_deps", *LIBRARIES):
        ctypes.CDLL(str(torch_folder() / "lib" / f"lib{library}.so"), ctypes.RTLD_GLOBAL)
    path = str(folder / f"{NAME}.so")
    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    import torch._dynamo
    import torch._inductor  # noqa: F401  (both look for parts of torch.cuda that this build lacks, once there is a GPU)

    spec = spec_from_loader(NAME, ExtensionFileLoader(NAME, path))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(gpu: Any) -> None:
    """Put the device behind torch.cuda."""
    import torch

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            gpu.pin(tensor)
        return tensor

    plain_empty = torch.empty

    def empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        out = plain_empty(*sizes, **options)
        return pin(out) if pin_memory else out

    torch.empty = empty
    torch.Tensor.pin_memory = lambda self, device=None: pin(self.clone())  # type: ignore[method-assign]
    properties = types.SimpleNamespace(name="simulated GPU", total_memory=16 << 30, multi_processor_count=1)
    properties.major, properties.minor = 9, 0
    properties.gcnArchName = ""  # which torch's compiler reads even if it compiles for the CPU
    offered: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait("synchronize()"),
        "set_sync_debug_mode": lambda mode: gpu.waits_are_errors(mode == "error"),
        "memory_allocated": lambda device=None: gpu.taken(),
        "max_memory_allocated": lambda device=None: gpu.peak(),
        "reset_peak_memory_stats": lambda device=None: gpu.reset_peak(),
    }
    for name, value in {**offered, **streams_and_graphs(gpu)}.items():
        setattr(torch.cuda, name, value)


def streams_and_graphs(device: Any) -> dict[str, Any]:
    """Streams, which only have names, and graphs."""
    import torch

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def wait_stream(self, other: "Stream") -> None:
            pass

    class CUDAGraph:
        def __init__(self) -> None:
            self.graph = device.Graph()

        def replay(self) -> None:
            self.graph.replay()

    capturing: set[int] = set()  # pools that the allocator has not left
    leaked: list[torch.Tensor] = []

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        if capturing:
            leaked.append(tensor)

    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign]

    def end_allocate_to_pool(device: int, pool: tuple[int, int]) -> None:
        if pool[1] not in capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        capturing.remove(pool[1])

    torch._C._cuda_endAllocateToPool = end_allocate_to_pool
    torch._C._cuda_releasePool = lambda device, pool: None
    main_stream = Stream()
    current = [main_stream]
    pools: dict[int, list[weakref.ref[CUDAGraph]]] = {}

    @contextlib.contextmanager
    def stream(own: Stream) -> Iterator[None]:
        before, current[0] = current[0], own
        try:
            yield
        finally:
            current[0] = before

    def graph_pool_handle() -> tuple[int, int]:
        pools[len(pools) + 1] = []
        return 0, len(pools)

    @contextlib.contextmanager
    def graph(graph: CUDAGraph, pool: tuple[int, int], stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream is not main_stream, "a capture needs a stream of its own"
        graphs = pools[pool[1]]
        assert not graphs or any(own() for own in graphs), "all graphs of the pool are gone, which ends it"
        device.wait("a capture's begin")
        state, before = torch.get_rng_state(), current[0]
        current[0] = stream
        graph.graph.begin(pool[1])
        try:
            yield
        except RuntimeError as error:
            if "stream is capturing" in str(error):  # which makes a capture invalid: torch fails to end it
                capturing.add(pool[1])
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
            raise
        finally:
            graph.graph.end()
            torch.set_rng_state(state)
        current[0] = before  # left as it is by an error, as torch's own may leave it
        graphs.append(weakref.ref(graph))

    return {
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: current[0],
        "set_stream": lambda own: current.__setitem__(0, own),
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": device.recording,
    }


def install_attention() -> list[Any]:
    """torch's operators by the formula; what a kernel refuses is refused. Returns what must be kept."""
    import torch

    def parts(query_starts: torch.Tensor, starts: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        firsts, others = query_starts.tolist(), starts.tolist()
        for i in range(len(others) - 1):
            yield slice(firsts[i], firsts[i + 1]), slice(others[i], others[i + 1])

    def probabilities(
        query: torch.Tensor, key: torch.Tensor, scale: float, dropout: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of [Q, heads, width] and [T, heads, width]: [heads, Q, T], and what dropout multiplies them by."""
        weights = (torch.einsum("qhd,khd->hqk", query, key) * scale).softmax(dim=2)
        kept = torch.rand(weights.shape, generator=generator) >= dropout
        return weights, kept / (1 - dropout)

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_starts: torch.Tensor, starts: torch.Tensor,
        dropout: float, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        seed = torch.randint(0, 2**62, (1,))
        generator, out = torch.Generator().manual_seed(int(seed)), torch.zeros_like(query)
        for own, others in parts(query_starts, starts):
            weights, kept = probabilities(query[own].float(), key[others].float(), scale, dropout, generator)
            out[own] = torch.einsum("hqk,khd->qhd", weights * kept, value[others].float()).to(out.dtype)
        return out, seed

    def backward(
        gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_starts: torch.Tensor,
        starts: torch.Tensor, seed: torch.Tensor, dropout: float, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        generator = torch.Generator().manual_seed(int(seed))
        of_query, of_key, of_value = (torch.zeros_like(own) for own in (query, key, value))
        for own, others in parts(query_starts, starts):
            q, k, v, g = query[own].float(), key[others].float(), value[others].float(), gradient[own].float()
            weights, kept = probabilities(q, k, scale, dropout, generator)
            of_value[others] = torch.einsum("hqk,qhd->khd", weights * kept, g).to(value.dtype)
            of_weights = torch.einsum("qhd,khd->hqk", g, v) * kept
            of_scores = weights * (of_weights - (of_weights * weights).sum(dim=2, keepdim=True)) * scale
            of_query[own] = torch.einsum("hqk,khd->qhd", of_scores, k).to(query.dtype)
            of_key[others] = torch.einsum("hqk,qhd->khd", of_scores, q).to(key.dtype)
        return of_query, of_key, of_value

    own = torch.library.Library("simulated_gpu", "DEF")
    heads = "Tensor query, Tensor key, Tensor value, Tensor query_starts, Tensor starts"
    own.define(f"forward({heads}, float dropout, float scale) -> (Tensor, Tensor)")
    own.define(f"backward(Tensor out, {heads}, Tensor seed, float dropout, float scale) -> (Tensor, Tensor, Tensor)")
    own.impl("forward", forward, "CPU")
    own.impl("backward", backward, "CPU")

    def attend(query: Any, key: Any, value: Any, query_starts: Any, starts: Any, *rest: Any, **options: Any) -> Any:
        for tensor in (query, key, value):
            if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.dtype != query.dtype:
                raise RuntimeError("FlashAttention only supports fp16 and bf16")
            if not len(tensor) or tensor.dim() != 3 or tensor.stride(2) != 1 or tensor.shape[2] % 8:
                raise RuntimeError(f"FlashAttention does not take {tuple(tensor.shape)}, strides {tensor.stride()}")
        assert query_starts.dtype == starts.dtype == torch.int32 and query_starts.is_cuda and starts.is_cuda
        out, seed = torch.ops.simulated_gpu.forward(query, key, value, query_starts, starts, rest[2], options["scale"])
        return out, out.new_empty(0), seed, out.new_empty(0), out.new_empty(0)

    def attend_back(
        out: Any, query: Any, key: Any, value: Any, _out: Any, _sums: Any, query_starts: Any, starts: Any, *rest: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        return torch.ops.simulated_gpu.backward(
            out, query, key, value, query_starts, starts, rest[4], rest[2], options["scale"]
        )

    def attend_efficiently(
        query: Any, key: Any, value: Any, bias: Any, query_starts: Any, starts: Any, longest_query: int, longest: int,
        dropout: float, *_: Any, **options: Any,
    ) -> Any:  # fmt: skip
        for tensor in (query, key, value):
            assert tensor.dim() == 4 and len(tensor) == 1 and tensor.stride(3) == 1 and tensor.dtype == query.dtype
        assert query_starts.dtype == starts.dtype == torch.int32 and query_starts.is_cuda and starts.is_cuda
        rows = query[0], key[0], value[0]
        out, seed = torch.ops.simulated_gpu.forward(*rows, query_starts, starts, dropout, options["scale"])
        return out[None], out.new_empty(0), seed, out.new_empty(0), longest_query, longest

    def attend_efficiently_back(
        out: Any, query: Any, key: Any, value: Any, bias: Any, _out: Any, query_starts: Any, starts: Any, _query: int,
        _longest: int, _sums: Any, dropout: float, seed: Any, *_: Any, **options: Any,
    ) -> Any:  # fmt: skip
        rows = out[0], query[0], key[0], value[0]
        found = torch.ops.simulated_gpu.backward(*rows, query_starts, starts, seed, dropout, options["scale"])
        return *(x[None] for x in found), out.new_empty(0)

    theirs = torch.library.Library("aten", "IMPL")
    theirs.impl("_efficient_attention_forward", attend_efficiently, "CUDA")
    theirs.impl("_efficient_attention_backward", attend_efficiently_back, "CUDA")
    theirs.impl("_flash_attention_forward", attend, "CUDA")
    theirs.impl("_flash_attention_backward", attend_back, "CUDA")
    return [own, theirs]


if __name__ == "__main__":
    compile_device(Path(sys.argv[1]))
else:
    simulated = load_device(Path(os.environ["SIMULATED_GPU"]))
    install(simulated)
    kept = install_attention()
