"""Checkpoints on disk: reading a source block by block, writing a packed one that appears whole or not at all.

A run writes into OUT.partial, one safetensors file a decoder block as it is finished. At the end the files
are joined into the shards that `save_pretrained` would have written, config.json and the manifest are added,
and the folder is renamed to OUT. Where it is known beforehand what a shard will hold, finished blocks are copied into it
while the next ones are worked on. A killed run leaves OUT.partial alone; the same command continues it. One that
was killed after the renaming leaves both: a mark in OUT.partial then says that OUT is whole.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantkit.errors import MachineError, QuantKitError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "quantkit_manifest.json"
MANIFEST_VERSION = 1
MAX_SHARD_SIZE = "50GB"  # save_pretrained's default, so that saving again gives the same files
RECORD = "job.json"  # in OUT.partial: what makes its bytes
JOINED = "out"  # what becomes OUT
FINISHED = "finished"  # the mark, made just before OUT appears
FILLING = ".filling"  # ends the name of a shard into which blocks are copied as they are finished
LARGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no larger one
CHUNK = 1 << 22  # bytes copied at a time
PIECE = 1 << 26  # bytes of a tensor that one thread copies
COPIERS = 8  # threads; reading, sums and writing hold no lock of Python's
BITS_OF = {
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F32", "U32", "I32"), 32),
    **dict.fromkeys(("BF16", "F16", "U16", "I16"), 16),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
COPIES = 2  # of a checkpoint on the disk, before its parts are removed: they, and the shards that they are joined into
# The order in which safetensors lays out tensors: its dtypes from the widest alignment down.
DTYPE_ORDER = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
)

Kind = tuple[str, tuple[int, ...]]  # of a stored tensor: safetensors dtype and shape


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, safetensors dtype, shape, the byte range in the file, and its name there.

    `index` is not empty where it is a part of the tensor of that name; shape and byte range are the part's.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    name: str
    index: tuple[int | slice, ...] = ()

    @property
    def kind(self) -> Kind:
        return self.dtype, self.shape


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header.

    Raises:
        QuantKitError: the file is truncated or its header is not that of a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise QuantKitError(f"{path}: truncated or not a safetensors file ({size} bytes); copy it again")
        if length > LARGEST_HEADER:
            raise QuantKitError(
                f"{path}: damaged: a safetensors header of {length} bytes, expected at most {LARGEST_HEADER}; copy it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data = 8 + length
            tensors = {
                name: StoredTensor(path, t["dtype"], tuple(t["shape"]), data + start, data + stop, name)
                for name, t in header.items()
                for start, stop in [t["data_offsets"]]
            }
            for tensor in tensors.values():
                check_extent(tensor)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise QuantKitError(
                f"{path}: damaged safetensors header ({error}); copy the file again"
            ) from error
    needed = max((t.stop for t in tensors.values()), default=0)
    if size < needed:
        raise QuantKitError(
            f"{path}: truncated, {size} bytes where its header promises {needed}; copy it again"
        )
    return tensors


def check_extent(tensor: StoredTensor) -> None:
    """Raises ValueError where shape and dtype do not make the bytes that the header gives the tensor."""
    if tensor.dtype not in BITS_OF:
        raise ValueError(f"{tensor.name} has the dtype {tensor.dtype!r}")
    if not all(type(size) is int and size >= 0 for size in (*tensor.shape, tensor.start, tensor.stop)):
        raise ValueError(f"{tensor.name} has sizes that are no whole numbers")
    needed = prod(tensor.shape) * BITS_OF[tensor.dtype]
    if needed != 8 * (tensor.stop - tensor.start):
        raise ValueError(
            f"{tensor.name} has {tensor.stop - tensor.start} bytes for {tensor.dtype} {list(tensor.shape)}"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, by its index where it has one.

    Raises:
        QuantKitError: there are none, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise QuantKitError(f"{index}: cannot be read ({error}); copy it again") from error
        if strangers := [name for name in names if Path(name).name != name or name == ".."]:
            raise QuantKitError(
                f"{index}: names {strangers[0]!r}, expected files of its own folder; do not trust this checkpoint"
            )
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise QuantKitError(
                f"{file}: not found; quantkit reads safetensors weights, or one GGUF file, and no pickled ones (.bin, .pt)"
            )
    return files


class CheckpointReader:
    """The tensors of a model directory, read by name; nothing stays in memory that the caller does not hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self.tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            self.tensors.update(read_header(path))

    def find(self, name: str) -> StoredTensor:
        """Where the tensor lies.

        Raises:
            QuantKitError: it is in none of the files.
        """
        if name not in self.tensors:
            raise QuantKitError(
                f"{self.folder}: tensor {name} is in none of its {len(self.files)} safetensors files; "
                "the files don't belong to this config.json, or the architecture stores its weights otherwise"
            )
        return self.tensors[name]

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, as they are stored.

        Raises:
            QuantKitError: a name is in none of the files.
            MachineError: a file cannot be read any more.
        """

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.find(name).file, []).append(name)
        loaded = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as file, ThreadPoolExecutor(COPIERS) as pool:
                    for name in wanted:
                        stored = self.tensors[name]
                        part = (
                            file.get_slice(stored.name)[stored.index]
                            if stored.index
                            else file.get_tensor(stored.name)
                        )
                        # a copy: a tensor that views the mapped file would keep its pages counted as ours. By threads, for
                        # torchrun leaves torch one
                        with torch.inference_mode(False):  # in which threads are not
                            loaded[name] = torch.empty_like(part, memory_format=torch.contiguous_format)
                            flat = loaded[name].view(-1), part.reshape(-1)
                        slices = (tensor.split(PIECE // part.element_size()) for tensor in flat)
                        list(pool.map(torch.Tensor.copy_, *slices))
            except SafetensorError as error:
                raise QuantKitError(f"{path}: cannot be read ({error}); copy it again") from error
            except OSError as error:
                raise MachineError(f"{path}: cannot be read ({error}); it was there before") from error
        return loaded


@dataclass(frozen=True)
class Layout:
    """Of a safetensors file: the bytes before its tensors, and where in the file those of each tensor begin, by name."""

    head: bytes
    starts: dict[str, int]


def layout(kinds: dict[str, Kind]) -> Layout:
    """How `safetensors.torch.save_file(tensors, out, metadata={"format": "pt"})` lays out tensors of these kinds.

    Its header has them by falling alignment and then by name, padded with blanks to a multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, offset = {}, 0
    for name in sorted(kinds, key=lambda name: (DTYPE_ORDER.index(kinds[name][0]), name)):
        dtype, shape = kinds[name]
        offsets[name], end = offset, offset + size_of(kinds[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, {name: len(head) + at for name, at in offsets.items()})


def size_of(kind: Kind) -> int:
    """Bytes of a stored tensor."""
    dtype, shape = kind
    return prod(shape) * BITS_OF[dtype] // 8


def split_into_shards(kinds: dict[str, Kind]) -> StateDictSplit:
    """Which file holds which tensors, as `save_pretrained` would have it; `kinds` in the order in which it fills them."""
    return split_state_dict_into_shards_factory(
        kinds,
        get_storage_size=size_of,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )


def join_safetensors(
    names: list[str],
    sources: dict[str, StoredTensor],
    out: Path,
    sums: dict[str, str] | None = None,
    placed: Collection[str] = (),
) -> dict[str, str]:
    """Copies tensors out of safetensors files into one, laid out by `layout`, in little memory, several at a time.

    Args:
        sums: sha256 of tensors' bytes, by name, where they are known.
        placed: tensors that are in their places in `out` already.

    Returns:
        sha256 of each tensor's bytes, by name.
    """
    planned = layout({name: sources[name].kind for name in names})
    known, waiting = sums or {}, 0
    with out.open("r+b" if placed else "wb") as target, ThreadPoolExecutor(COPIERS) as pool:
        write_at(target, planned.head, 0)
        found = {name: pool.submit(sha256, sources[name]) for name in names if name not in known}
        copies = [
            (piece, pool.submit(copy_bytes, piece, target, planned.starts[name] + at))
            for name in planned.starts
            if name not in placed
            for at, piece in pieces(sources[name])
        ]
        try:
            for piece, done in copies:
                done.result()
                waiting += piece.stop - piece.start
                if waiting > COPIERS * PIECE:
                    sync(target)  # the disk writes while the rest is copied
                    waiting = 0
            known = known | {name: done.result() for name, done in found.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error, or Ctrl-C, does not wait for the rest
            raise
        sync(target)
    return {name: known[name] for name in names}


def copy_bytes(tensor: StoredTensor, target: IO[bytes], at: int) -> None:
    for chunk in tensor_bytes(tensor):
        write_at(target, chunk, at)
        at += len(chunk)


def pieces(tensor: StoredTensor) -> Iterator[tuple[int, StoredTensor]]:
    """A tensor's bytes in pieces, whose shape says nothing, and where in it each begins."""
    for at in range(0, tensor.stop - tensor.start, PIECE):
        start = tensor.start + at
        yield at, replace(tensor, start=start, stop=min(start + PIECE, tensor.stop))


def write_at(file: IO[bytes], data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, at)
        data, at = data[written:], at + written


def tensor_bytes(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise QuantKitError(f"{tensor.file}: ended {left} bytes early; copy it again")
            left -= len(chunk)
            yield chunk


def sha256(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for chunk in tensor_bytes(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of(tensor: torch.Tensor) -> str:
    """Of the bytes of a contiguous tensor on the CPU, as a file holds them."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def draft_of(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    draft = draft_of(path)
    with draft.open("wb") as file:
        file.write(text.encode())
        sync(file)
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QuantKitError(f"{path}: not found; is {path.parent} a model directory?") from error
    except (ValueError, RecursionError) as error:
        raise QuantKitError(f"{path}: not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise QuantKitError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content


def megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def staging_folder(out: Path) -> Path:
    """OUT.partial, where a run works until OUT can appear whole."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path) -> None:
    """Refuses, before the work, a directory that cannot be made."""
    if not out.name:
        raise QuantKitError(
            f"{str(out)!r}: has no name of its own, expected a directory to make; name one, as OUT"
        )
    if out.exists():
        staging = staging_folder(out)
        if (staging / FINISHED).exists() and not (staging / JOINED).exists():
            clear(staging)
            raise QuantKitError(
                f"{out}: exists already and is complete: the run that made it was stopped as it removed {staging}, which "
                f"is gone now; quantkit verify {out} checks it"
            )
        raise QuantKitError(f"{out}: exists already; remove it or name another directory")
    parent = existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fault = "not writable" if parent.is_dir() else "not a directory"
        raise QuantKitError(f"{parent}: {fault}, so {out} cannot be made; name another place")


def clear(staging: Path) -> None:
    """Removes OUT.partial: the record of its job and the mark last, so that a kill leaves nothing unexplained."""
    for path in staging.iterdir():
        if path.name not in (RECORD, FINISHED):
            path.unlink()
    (staging / RECORD).unlink(missing_ok=True)
    shutil.rmtree(staging)


def existing_parent(out: Path) -> Path:
    return next(path for path in out.absolute().parents if path.exists())


def space(out: Path, size: int) -> tuple[int, int]:
    """Bytes that a checkpoint of `size` bytes still needs on the disk, and those that are free there.

    What OUT.partial holds is not needed again: the run goes on from it, or clears it.
    """
    found = [path.stat() for path in staging_folder(out).rglob("*") if path.is_file()]
    # a shard that is being filled has holes
    staged = sum(min(file.st_size, 512 * file.st_blocks) for file in found)
    return max(0, COPIES * size - staged), shutil.disk_usage(existing_parent(out)).free


def check_space(out: Path, size: int) -> None:
    """Refuses, before the work, a disk that is too small for a checkpoint of `size` bytes."""
    needed, free = space(out, size)
    if needed > free:
        raise QuantKitError(
            f"{existing_parent(out)}: {megabytes(free)} free, but {out} needs about {megabytes(needed)} until its "
            "parts are joined; free some space or name another place"
        )


class CheckpointWriter:
    """Writes OUT by way of OUT.partial; a context manager.

    Args:
        out: the directory to make; must not exist.
        job: what makes these bytes (source files, recipe, calibration tokens), as JSON values. A folder
            OUT.partial that the same job left is continued, one that another job left is cleared.
        size: about how many bytes OUT will have.

    Raises:
        QuantKitError: OUT exists, or another process is writing it.
        MachineError: a file cannot be written, for want of space say; OUT.partial keeps the finished parts.
    """

    def __init__(self, out: Path, job: dict[str, Any], size: int) -> None:
        check_out(out)
        self.out, self.staging, self.job, self.size = out, staging_folder(out), job, size
        self.sums: dict[str, str] = {}  # sha256 of what this run has stored, by the tensor's name
        self.expected: dict[str, Kind] = {}  # tensors, by name
        self.layouts: dict[str, Layout] = {}  # of shards that hold them, by the file's name
        self.filling = ThreadPoolExecutor(1)
        self.filled: list[Future[list[str]]] = []  # names of tensors that are in their places, part by part

    def __enter__(self) -> "CheckpointWriter":
        with self.writing(self.staging):
            self.staging.mkdir(parents=True, exist_ok=True)
            self.lock = (self.staging / "lock").open("w")
        try:
            self.claim()
        except BaseException:
            self.lock.close()
            raise
        return self

    def claim(self) -> None:
        """Makes OUT.partial this process's and this job's."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise QuantKitError(
                f"{self.staging}: another quantkit process is writing it; wait for it"
            ) from error
        lock, record = self.staging / "lock", self.staging / RECORD
        text = json.dumps(self.job, indent=1, sort_keys=True)
        (self.staging / FINISHED).unlink(missing_ok=True)  # OUT did not come to be, or was removed
        drafts = (lock, draft_of(record))  # what a run leaves that was killed at this place
        if not record.exists() and any(path not in drafts for path in self.staging.iterdir()):
            lock.unlink()
            raise QuantKitError(
                f"{self.staging}: holds files that no quantkit run left; move them, or name another OUT"
            )
        if not record.exists() or record.read_bytes() != text.encode():
            for path in self.staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path not in (lock, record):  # without its record the rest would be a stranger's
                    path.unlink()
            with self.writing(record):
                write_text(record, text)
        for draft in self.staging.glob(".tmp*"):  # safetensors' own, of a killed run
            draft.unlink()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.filling.shutdown(cancel_futures=True)
        with suppress(OSError):  # what has ended the run is to be told
            for filename in self.layouts:  # the parts have all that these hold
                self.shard(filename).unlink(missing_ok=True)
        if kind is not None and issubclass(kind, QuantKitError) and not issubclass(kind, MachineError):
            shutil.rmtree(self.staging)  # the input is at fault: once mended it is another job
        self.lock.close()

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turns a failure to write into one line: the file, the space that is missing, and how to go on."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            file = path
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                file = error.filename2 or error.filename or path
            else:  # safetensors has the system's number in its text alone
                number = re.search(r"os error (\d+)", str(error))
                reason = os.strerror(int(number[1])) if number else str(error)
            with suppress(OSError):
                path.unlink()  # half of a file only takes space
            needed, free = space(self.out, self.size)
            raise MachineError(
                f"{file}: cannot be written ({reason}); {megabytes(free)} free, about {megabytes(needed)} needed; "
                f"{self.staging} keeps the finished blocks, and the same command continues"
            ) from error

    def part(self, name: str) -> Path:
        return self.staging / f"{name}.safetensors"

    def write_part(self, name: str, tensors: dict[str, torch.Tensor], notes: list[dict[str, Any]]) -> None:
        """Stores one part: its tensors, their sums, and what there is to say of its modules.

        Nothing waits for the disk: what a lost power supply leaves of a part does not have its sums.
        """
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with ThreadPoolExecutor(COPIERS) as pool, self.writing(self.part(name)):
            found = pool.map(sha256_of, tensors.values())
            draft = self.part(name).with_suffix(".tmp")
            save_file(tensors, draft)
            sums = dict(zip(tensors, found, strict=True))
            described = json.dumps({"notes": notes, "sha256": sums})
            self.part(name).with_suffix(".json").write_text(described)
            draft.replace(self.part(name))
        self.sums |= sums
        if self.layouts:
            self.filled.append(self.filling.submit(self.fill_shards, name))

    def expect(self, kinds: dict[str, Kind]) -> None:
        """Lays out the shards of tensors that will come, so that parts are put in their places while the next are worked on.

        Args:
            kinds: in the order in which shards are filled. If other tensors come in the end, the parts are joined then.
        """
        self.expected = kinds
        for filename, names in split_into_shards(kinds).filename_to_tensors.items():
            self.layouts[filename] = layout({name: kinds[name] for name in names})
            with self.writing(self.shard(filename)):
                self.shard(filename).write_bytes(b"")

    def shard(self, filename: str) -> Path:
        """The shard that is being filled."""
        return self.staging / (filename + FILLING)

    def fill_shards(self, part: str) -> list[str]:
        """Copies a part's tensors into their places; the names of those that were expected."""
        sources = {
            name: tensor
            for name, tensor in read_header(self.part(part)).items()
            if self.expected.get(name) == tensor.kind
        }
        for filename, planned in self.layouts.items():
            if names := sources.keys() & planned.starts.keys():
                with self.shard(filename).open("r+b") as shard:
                    for name in sorted(names):
                        copy_bytes(sources[name], shard, planned.starts[name])
                    sync(shard)
        return list(sources)

    def read_part(self, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """What `write_part` stored under the name, in this run or a killed one before; None if nothing whole."""
        path = self.part(name)
        if not path.exists():
            return None
        try:
            described = json.loads(path.with_suffix(".json").read_text())
            sums = {key: sha256(tensor) for key, tensor in read_header(path).items()}
            damaged = described["sha256"] != sums
        except (QuantKitError, OSError, ValueError, KeyError, TypeError):
            damaged = True
        if damaged:
            path.unlink()  # a damaged disk or a lost cache: the part is made again
            return None
        self.sums |= sums
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        return tensors, described["notes"]

    def finish(
        self,
        order: Iterable[str],
        total_parameters: int,
        add_files: Callable[[Path], None],
        manifest: bool = True,
    ) -> None:
        """Joins the parts into shards, adds the manifest and whatever `add_files` writes, and shows OUT.

        Args:
            order: names of all tensors of the checkpoint, as shards are filled.
            total_parameters: for the index file of a checkpoint of several shards.
            manifest: whether to write one.
        """

        def fill(folder: Path, sources: dict[str, StoredTensor]) -> None:
            entries = self.join(folder, sources, order, total_parameters)
            with self.writing(folder):
                add_files(folder)
                if manifest:
                    save_manifest(folder, entries)

        self.publish(fill)

    def publish(self, fill: Callable[[Path, dict[str, StoredTensor]], None]) -> None:
        """Shows OUT, which `fill` makes of the parts: it gets the folder, and where their tensors are."""
        sources: dict[str, StoredTensor] = {}
        for path in self.staging.glob("*.safetensors"):
            sources.update(read_header(path))
        folder = self.staging / JOINED
        with self.writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        fill(folder, sources)
        with self.writing(folder):
            for path in [*folder.iterdir(), folder]:
                sync_path(path)
            (self.staging / FINISHED).touch()
            folder.rename(self.out)
        sync_path(self.out.parent)
        clear(self.staging)

    def join(
        self,
        folder: Path,
        sources: dict[str, StoredTensor],
        order: Iterable[str],
        total_parameters: int,
    ) -> dict[str, dict[str, Any]]:
        """Writes the shards and their index; the manifest's entries of their tensors."""
        kinds = {name: sources[name].kind for name in order}
        shards = split_into_shards(kinds)
        self.filling.shutdown()  # once it has done all
        foreseen = list(kinds.items()) == list(self.expected.items())
        # what could not be copied is copied now
        placed = {name for part in self.filled if foreseen and not part.exception() for name in part.result()}
        with self.writing(folder):
            for filename in self.layouts:
                if foreseen:
                    self.shard(filename).rename(folder / filename)
                else:  # before its room is needed
                    self.shard(filename).unlink()
        entries = {}
        for filename, names in shards.filename_to_tensors.items():
            with self.writing(folder / filename):
                sums = join_safetensors(names, sources, folder / filename, sums=self.sums, placed=placed)
            entries.update({name: manifest_entry(sources[name], filename, sums[name]) for name in names})
        if shards.is_sharded:
            index = {
                "metadata": {"total_parameters": total_parameters, **shards.metadata},
                "weight_map": shards.tensor_to_filename,
            }
            with self.writing(folder):
                write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        return entries


def manifest_entry(tensor: StoredTensor, filename: str, digest: str) -> dict[str, Any]:
    return {"file": filename, "dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": digest}


def save_manifest(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    manifest = {"manifest_version": MANIFEST_VERSION, "tensors": entries}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the safetensors files that lie in a folder."""
    tensors = CheckpointReader(folder).tensors
    save_manifest(folder, {name: manifest_entry(t, t.file.name, sha256(t)) for name, t in tensors.items()})


def damage(folder: Path) -> list[str]:
    """What is wrong with the tensors of a checkpoint, judged by its manifest: one line a finding.

    Raises:
        QuantKitError: the manifest or a safetensors header cannot be read at all.
    """
    expected = read_json(folder / MANIFEST)
    if expected.get("manifest_version") != MANIFEST_VERSION:
        raise QuantKitError(
            f"{folder / MANIFEST}: manifest_version {expected.get('manifest_version')}, "
            f"this quantkit reads {MANIFEST_VERSION}; install a newer quantkit"
        )
    try:
        entries = {
            name: (folder / entry["file"], entry["dtype"], entry["shape"], entry["sha256"])
            for name, entry in expected["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise QuantKitError(f"{folder / MANIFEST}: cannot be read ({error!r}); copy it again") from error
    found = CheckpointReader(folder).tensors
    lines = [f"{name}: not in the manifest" for name in found if name not in entries]
    for name, (file, dtype, shape, digest) in entries.items():
        tensor = found.get(name)
        if tensor is None:
            lines.append(f"{name}: missing, expected in {file}")
        elif (tensor.dtype, list(tensor.shape)) != (dtype, shape):
            lines.append(
                f"{name}: {tensor.file} holds {tensor.dtype} {list(tensor.shape)}, "
                f"the manifest says {dtype} {shape}"
            )
        elif sha256(tensor) != digest:
            lines.append(
                f"{name}: {tensor.file} has other bytes than were written (sha256 differs); copy it again"
            )
    return lines
