"""Look into archives and pickles before torch and numpy read them: what would exhaust memory is refused."""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.untrusted import open_regular

LEGACY_PICKLES = 5  # of torch's format before zip: number, version, machine, the content, and names of its storages
# What torch.save writes for tensors, numbers, texts, lists, tuples and dicts, by any of its protocols.
PLAIN_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
    "BUILD BINPERSID"
)
MAX_BITS = 128  # of a whole number; ours have 63 at most
REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")  # of torch._utils


def refuse_inflating(path: Path) -> None:
    """Raise ValueError if a zip archive, as torch and numpy write them, claims to hold more bytes than it has.

    torch and numpy do not compress, so such a file can only be meant to fill the memory of its reader.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    if claimed > path.stat().st_size:
        raise ValueError(f"its members claim {claimed:,} bytes, more than the file has")


def refuse_objects(path: Path) -> None:
    """Raise an error if a file of torch.save holds anything but tensors and plain containers, or claims too much.

    torch.load with weights_only runs no code, but it allows `bytearray(N)` and storages of N numbers, so that a file of
    some hundred bytes takes as much memory as it asks for. This reads the pickle first and makes nothing of it.
    """
    refuse_inflating(path)
    with open_regular(path) as file:
        if file.read(4) == b"PK\x03\x04":  # as torch decides
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if member.filename.endswith("constants.pkl"):
                        raise pickle.UnpicklingError("it holds a program of TorchScript")
                    if member.filename.endswith("data.pkl"):
                        TensorPickle(io.BytesIO(archive.read(member))).check()
            return
        file.seek(0)
        size, claimed = path.stat().st_size, 0
        for _ in range(LEGACY_PICKLES):
            content = TensorPickle(file)
            content.check()
            claimed += sum(content.numbers.values())
        if claimed > size:  # torch makes room for them before it reads them
            raise ValueError(f"its tensors claim {claimed:,} numbers, more than the file has bytes")


def load_plain(path: Path, mmap: bool = False) -> Any:
    """Return what `torch.save` wrote, on the CPU. Runs no code; call `refuse_objects` first."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        if "weights_only" not in str(error):
            raise
        # torch's text advises to load the file in a way that runs its code
        raise pickle.UnpicklingError("it holds more than tensors and plain containers") from error


class TensorPickle(pickle.Unpickler):
    """A pickle of torch.save, read from where `file` stands, of which nothing is made: a tensor becomes None."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.file = file
        self.numbers: dict[str, int] = {}  # how many numbers each storage claims to have

    def check(self) -> None:
        """Raise an error unless the pickle holds tensors, numbers, texts and containers of these alone."""
        start, puts, known = self.file.tell(), 0, set(PLAIN_OPCODES.split())
        for opcode, argument, _ in pickletools.genops(self.file):
            if opcode.name not in known:
                raise pickle.UnpicklingError(f"it holds more than tensors and plain containers ({opcode.name})")
            if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
                raise pickle.UnpicklingError("it holds a number of more digits than any of ours")
            if "PUT" in opcode.name:
                puts += 1
                if not 0 <= int(argument or 0) <= 2 * puts:  # room is made for the largest number
                    raise pickle.UnpicklingError("its memo claims more than it has")
        self.file.seek(start)
        self.load()

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for what a pickle may name. Raises UnpicklingError for anything else."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in REBUILD:
            return no_tensor
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name  # a text cannot be called
        raise pickle.UnpicklingError(f"it holds {module}.{name}, more than tensors and containers")

    def persistent_load(self, pid: Any) -> None:
        """Note the size of a storage; its numbers stand elsewhere in the file."""
        kind, _, key, _, numbers, *_ = pid
        if kind != "storage" or not isinstance(numbers, int) or numbers < 0:
            raise pickle.UnpicklingError("it refers to something that is no tensor")
        self.numbers[str(key)] = numbers


def no_tensor(*_: Any) -> None:
    """Stand for a function that makes a tensor."""
