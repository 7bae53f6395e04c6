"""Archives of `torch.save` (`.pth`, `.bin`) as byte ranges: where every tensor lies, and the layout of new ones. No torch, no copies of weights.

Such a file is a zip archive `NAME/data.pkl`, `NAME/byteorder`, `NAME/data/0`…, whose entries are stored without compression: every tensor is
a range of the file. `data.pkl` is unpickled with nothing at hand but stand-ins for tensors and plain containers. What torch would load but
cannot be merged as it lies (a transposed view, a partial overlap) is refused here as well.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, final

from registry import tensors as limits
from registry.errors import CorruptFile, InvalidInput, UnsafePickle
from registry.tensors import DType, StoredTensor, TensorSpec, check_tensor_name

_ALIGNMENT_BYTES = 64
_MAX_PICKLE_DEPTH = 100
_COMPILED_PREFIX = "_orig_mod."
_STORAGE_CLASSES = {
    DType.F64: "DoubleStorage", DType.F32: "FloatStorage", DType.F16: "HalfStorage", DType.BF16: "BFloat16Storage",
    DType.I64: "LongStorage", DType.I32: "IntStorage", DType.I16: "ShortStorage", DType.I8: "CharStorage",
    DType.U8: "ByteStorage", DType.BOOL: "BoolStorage",
}  # fmt: skip
_STORAGE_DTYPES = {name: dtype for dtype, name in _STORAGE_CLASSES.items()}

_LOCAL, _CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_LOCAL_MARK, _CENTRAL_MARK, _DESCRIPTOR_MARK = b"PK\3\4", b"PK\1\2", b"PK\7\x08"
_END_MARK, _END64_MARK, _LOCATOR_MARK = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_MAX16, _MAX32, _JANUARY_1980 = 0xFFFF, 0xFFFFFFFF, 0x0021
_ENCRYPTED, _CRC_FOLLOWS, _UTF8 = 0x2041, 0x0008, 0x0800


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """What a torch archive holds: the tensors in the order of its pickle, and the groups of names that lie on the same bytes."""

    tensors: tuple[StoredTensor, ...]
    shared: tuple[tuple[str, ...], ...]


def is_torch_zip(head: bytes) -> bool:
    """Whether a file with these first bytes (at least 4) can be a torch archive."""
    return head[:4] == _LOCAL_MARK


def read_torch_zip(stream: IO[bytes], file: str, file_bytes: int) -> TorchArchive:
    """Find every tensor of a torch archive; of the weights themselves nothing is read.

    Taken is the mapping under the key `model` or `state_dict`, else the top level, without the prefix `_orig_mod.` of compiled models.

    Args:
        stream: a binary stream that can seek.
        file: the file's path relative to its model directory; kept in the result and in errors.
        file_bytes: size of the whole file.

    Raises:
        UnsafePickle: the pickle names something besides tensors and plain containers.
        CorruptFile: anything else against the format or the limits of this module.
    """
    archive = _ZipReader(stream, file, file_bytes)
    if archive.read("byteorder") not in (None, b"little"):
        raise CorruptFile(file, "the byte order is not little")
    data = archive.read("data.pkl")
    if data is None:
        raise CorruptFile(file, "a zip archive without data.pkl: not written by torch.save")
    views = _named_views(_unpickle(data, file), file)
    if not 0 < len(views) <= limits.MAX_TENSORS:
        raise CorruptFile(file, f"holds {len(views)} tensors; expected 1 to {limits.MAX_TENSORS}")
    tensors = tuple(_place(name, view, archive, file) for name, view in views.items())
    return TorchArchive(tensors, _shared_bytes(tensors, file))


@final
class _ZipReader:
    """The entries of a zip archive that only stores: one top folder, no compression, no encryption, nothing outside the file."""

    def __init__(self, stream: IO[bytes], file: str, file_bytes: int) -> None:
        self._stream, self._file, self._file_bytes = stream, file, file_bytes
        head = self._bytes(0, min(4, file_bytes))
        if not is_torch_zip(head):
            kind = "a bare pickle" if head[:1] == pickle.PROTO else "no zip archive"
            raise self._corrupt(f"{kind}; re-save with torch >= 1.6")
        self._top, self._headers = self._read_directory()
        if "constants.pkl" in self._headers or any(name.startswith("code/") for name in self._headers):
            raise self._corrupt("a TorchScript archive; re-save its state_dict with torch.save of torch >= 1.6")

    def find(self, name: str) -> tuple[int, int] | None:
        """Offset in the file and size of an entry's data, in bytes; None when there is no such entry."""
        if name not in self._headers:
            return None
        header_at, size = self._headers[name]
        path = f"{self._top}/{name}".encode()
        header = self._bytes(header_at, _LOCAL.size + len(path))
        mark, *_, path_bytes, extra_bytes = _LOCAL.unpack_from(header)
        start = header_at + len(header) + extra_bytes
        if mark != _LOCAL_MARK or path_bytes != len(path) or header[_LOCAL.size :] != path:
            raise self._corrupt(f"the local header of {name[:80]!r} does not match the zip directory")
        if start + size > self._file_bytes:
            raise self._corrupt(f"{name[:80]!r} ends at byte {start + size}, the file at byte {self._file_bytes}")
        return start, size

    def read(self, name: str) -> bytes | None:
        """The data of an entry of at most 64 MiB; None when there is no such entry."""
        place = self.find(name)
        return None if place is None else self._bytes(*place)

    def _corrupt(self, reason: str) -> CorruptFile:
        return CorruptFile(self._file, reason)

    def _bytes(self, offset: int, size: int) -> bytes:
        if size > limits.MAX_HEADER_BYTES:
            raise self._corrupt(f"{size} bytes of pickle or directory are more than {limits.MAX_HEADER_BYTES}")
        if offset + size <= self._file_bytes:
            self._stream.seek(offset)
            if len(data := self._stream.read(size)) == size:
                return data
        raise self._corrupt(f"truncated: bytes {offset} to {offset + size} of {self._file_bytes} are not there")

    def _read_directory(self) -> tuple[str, dict[str, tuple[int, int]]]:
        """The top folder; and by the path below it each entry's offset of the local header and size of the data, in bytes."""
        start, size, count = self._find_directory()
        raw, at = self._bytes(start, size), 0
        found: dict[str, tuple[int, int]] = {}
        folder = ""
        for _ in range(count):
            path, header_at, data_bytes, at = self._parse_entry(raw, at)
            top, _, name = path.partition("/")
            folder = folder or top
            if top != folder or not name:
                raise self._corrupt(f"{path[:80]!r} is not in the one top folder {folder[:80]!r}")
            if name in found:
                raise self._corrupt(f"the entry {name[:80]!r} occurs twice")
            found[name] = (header_at, data_bytes)
        if at != size:
            raise self._corrupt("the zip directory is longer than its entries")
        return folder, found

    def _find_directory(self) -> tuple[int, int, int]:
        """Start and size of the central directory in bytes, and its number of entries."""
        tail_bytes = min(self._file_bytes, _LOCATOR.size + _END.size)
        tail = self._bytes(self._file_bytes - tail_bytes, tail_bytes)
        if tail[-_END.size :][:4] != _END_MARK or tail_bytes < _END.size:
            raise self._corrupt("no zip directory at the end: truncated, or with something appended")
        *_, count, size, start, _ = _END.unpack(tail[-_END.size :])
        if tail[:4] == _LOCATOR_MARK:
            _, _, end_at, _ = _LOCATOR.unpack_from(tail)
            mark, *_, count, size, start = _END64.unpack(self._bytes(end_at, _END64.size))
            if mark != _END64_MARK:
                raise self._corrupt("malformed zip directory: no zip64 end record")
        return start, size, count

    def _parse_entry(self, raw: bytes, at: int) -> tuple[str, int, int, int]:
        """Path, offset of the local header and size of the data in bytes, and where the next entry begins."""
        try:
            fields = _CENTRAL.unpack_from(raw, at)
            mark, _, _, flags, method, *_, packed, size, path_bytes, extra_bytes, comment_bytes = fields[:13]
            extra_at = at + _CENTRAL.size + path_bytes
            path = raw[at + _CENTRAL.size : extra_at].decode()
            size, packed, header_at = _widen(raw[extra_at : extra_at + extra_bytes], size, packed, fields[-1])
        except (struct.error, UnicodeDecodeError) as error:
            raise self._corrupt(f"malformed zip directory: {error}") from error
        if mark != _CENTRAL_MARK or flags & _ENCRYPTED or method != 0 or packed != size:
            raise self._corrupt(f"{path[:80]!r} is compressed, encrypted or malformed; torch.save only stores")
        return path, header_at, size, extra_at + extra_bytes + comment_bytes


def _widen(extra: bytes, *fields: int) -> Iterable[int]:
    """The fields; those at the 32-bit limit come, in order, from the zip64 extra field."""
    while extra[:2] not in (b"", b"\1\0"):
        extra = extra[4 + struct.unpack_from("<H", extra, 2)[0] :]
    at = 4
    for field in fields:
        yield struct.unpack_from("<Q", extra, at)[0] if field == _MAX32 else field
        at += 8 * (field == _MAX32)


class _ElementType(NamedTuple):
    """A storage class or dtype of torch; `dtype` is None for untyped storages and for types the registry does not know."""

    name: str
    dtype: DType | None


class _Storage(NamedTuple):
    type: _ElementType
    key: str
    size_bytes: int


class _View(NamedTuple):
    """A tensor as the arguments of torch's `_rebuild_tensor_v3`: offset and strides count elements. Nothing about it is checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    requires_grad: Any
    hooks: Any
    type: Any
    metadata: Any = None


class _Mapping(dict[Any, Any]):
    """An OrderedDict of the pickle; made without arguments only, as copying one list many times could fill the memory."""

    def __setstate__(self, state: object) -> None:
        """Drop the attributes: `state_dict()` keeps version numbers of modules there."""


class _Global(NamedTuple):
    """A callable of the allow-list. A tuple, as a pickle can set attributes of any object it is given that takes them."""

    call: Callable[..., object]

    def __call__(self, *arguments: object) -> object:
        return self.call(*arguments)


def _tensor_v2(storage: _Storage, *arguments: Any) -> _View:
    offset, shape, strides, grad, hooks, *metadata = arguments
    return _View(storage, offset, shape, strides, grad, hooks, storage.type, *metadata)


_ALLOWED: Mapping[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): lambda: _Mapping(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _View,
    ("torch._utils", "_rebuild_parameter"): lambda data, _grad, _hooks: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, _grad, _hooks, _state: data,
    ("torch", "Size"): lambda sizes: tuple(sizes[: limits.MAX_DIMENSIONS + 1]),
}


@final
class _StateUnpickler(pickle.Unpickler):
    """Refuses every global outside the allow-list by its name; nothing is ever imported."""

    def __init__(self, data: bytes, file: str) -> None:
        super().__init__(io.BytesIO(data))
        self._file = file
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        if call := _ALLOWED.get((module, name)):
            return _Global(call)
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _ElementType(name, _STORAGE_DTYPES.get(name))
        if module == "torch" and (dtype := DType.from_long_name(name)):
            return _ElementType(name, dtype)
        raise UnsafePickle(self._file, f"asks for {module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, element_type, key, _, elements = pid
        is_number = isinstance(key, str) and key.isascii() and key.isdecimal()
        if kind != "storage" or not isinstance(element_type, _ElementType) or not is_number or not _is_count(elements):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        itemsize_bytes = element_type.dtype.itemsize_bytes if element_type.dtype else 1
        storage = _Storage(element_type, key, elements * itemsize_bytes)
        if self._storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key} is declared in two ways")
        return storage


def _unpickle(data: bytes, file: str) -> object:
    try:
        _check_opcodes(data)
        return _StateUnpickler(data, file).load()
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError,
        LookupError, OverflowError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise CorruptFile(file, f"data.pkl is malformed: {str(error)[:200]}") from error


def _check_opcodes(data: bytes) -> None:
    """Refuse what crashes or exhausts the interpreter's own unpickler.

    Hashing a deep tuple overflows the C stack; a memo number far beyond those in use makes it allocate all in between. So the pickle's
    stack is followed with the nesting depth of each object in its place, None for a mark.
    """
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            slot = len(memo) if argument is None else argument
            if slot > len(memo):
                raise pickle.UnpicklingError(f"memo number {slot} when {len(memo)} are in use")
            memo[slot] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            depth = _depth_after(opcode, stack)
            if depth > _MAX_PICKLE_DEPTH:
                raise pickle.UnpicklingError(f"nested more than {_MAX_PICKLE_DEPTH} deep")
            stack.extend([depth] * len(opcode.stack_after))


def _depth_after(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """Take an opcode's operands from the stack; the depth of what it makes of them."""
    operands, taken = opcode.stack_before, [-1]
    if pickletools.markobject in operands:
        while (top := stack.pop()) is not None:
            taken.append(top)
        operands = operands[: operands.index(pickletools.markobject)]
    taken.extend(stack.pop() or 0 for _ in operands)
    if opcode.stack_after and opcode.stack_after[0] in (pickletools.pydict, pickletools.pylist, pickletools.pyset):
        return 0  # these are never hashed, and growing one item by item does not make it deep
    return 1 + max(taken)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _named_views(loaded: object, file: str) -> dict[str, _View]:
    """The tensors of the state by their names, without the prefix of compiled models."""
    if not isinstance(loaded, dict):
        raise CorruptFile(file, "the top level is not a mapping of names to tensors")
    state = next((loaded[key] for key in ("model", "state_dict") if isinstance(loaded.get(key), dict)), loaded)
    views: dict[str, _View] = {}
    for key, value in state.items():
        name = key.removeprefix(_COMPILED_PREFIX) if isinstance(key, str) else "(not text)"
        if isinstance(value, _View):
            check_tensor_name(name, file)
            if name in views:
                raise CorruptFile(file, f"{name} occurs with and without {_COMPILED_PREFIX}")
            views[name] = value
        elif _holds_view(value):
            raise CorruptFile(file, f"tensors nested below {name[:80]!r}")
    return views


def _holds_view(value: object) -> bool:
    """Whether a tensor hides anywhere inside containers."""
    waiting, seen = [value], set[int]()
    while waiting:
        current = waiting.pop()
        if isinstance(current, _View):
            return True
        if id(current) not in seen and isinstance(current, (dict, list, tuple, set, frozenset)):
            seen.add(id(current))
            waiting.extend(current.values() if isinstance(current, dict) else current)
    return False


def _place(name: str, view: _View, archive: _ZipReader, file: str) -> StoredTensor:
    """Check a tensor against its storage, and that against the archive."""
    if problem := _view_problem(view):
        raise CorruptFile(file, f"{name}: {problem}")
    storage: _Storage = view.storage
    place = archive.find(f"data/{storage.key}")
    if place is None or place[1] != storage.size_bytes:
        found = "is not in the archive" if place is None else f"has {place[1]} bytes"
        raise CorruptFile(file, f"{name}: its storage {storage.key} of {storage.size_bytes} bytes {found}")
    spec = TensorSpec(name, view.type.dtype, view.shape)
    return StoredTensor(spec, file, place[0] + view.offset * spec.dtype.itemsize_bytes)


def _view_problem(view: _View) -> str:
    """Why a tensor is not a row-major range of its storage; empty when it is one."""
    if not isinstance(view.storage, _Storage) or not isinstance(view.type, _ElementType):
        return "not built on a storage"
    if view.type.dtype is None:
        return f"elements of {view.type.name[:80]} are not supported"
    parts = (view.shape, view.strides, (view.offset,))
    if not all(isinstance(part, tuple) and all(map(_is_count, part)) for part in parts):
        return "shape, strides and offset are not whole numbers"
    if not len(view.strides) == len(view.shape) <= limits.MAX_DIMENSIONS:
        return f"{len(view.shape)} dimensions and {len(view.strides)} strides; at most {limits.MAX_DIMENSIONS} are supported"
    if view.metadata:
        return "a conjugated or negated view"
    spec = TensorSpec("", view.type.dtype, view.shape)
    wanted = zip(view.shape, view.strides, _row_major(view.shape), strict=True)
    if spec.elements and any(size > 1 and stride != expected for size, stride, expected in wanted):
        return f"an expanded, transposed or strided view (shape {view.shape}, strides {view.strides})"
    if view.offset * spec.dtype.itemsize_bytes + spec.size_bytes > view.storage.size_bytes:
        return f"ends beyond its storage of {view.storage.size_bytes} bytes"
    return ""


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def _shared_bytes(tensors: Sequence[StoredTensor], file: str) -> tuple[tuple[str, ...], ...]:
    """Groups of names on the same bytes; refuses tensors that overlap in part or share bytes as different element types."""
    groups: dict[tuple[int, int, DType], list[str]] = {}
    for tensor in tensors:
        spec, start = tensor.spec, tensor.offset_bytes
        if spec.size_bytes:
            groups.setdefault((start, start + spec.size_bytes, spec.dtype), []).append(spec.name)
    for first, second in pairwise(sorted(groups)):
        if second[0] < first[1]:
            raise CorruptFile(file, f"{groups[first][0]} overlaps {groups[second][0]} in part or as another type")
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are known from the start."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Storage:
    """Here come the bytes of tensor `name`."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Here comes `ZipLayout.descriptor` of tensor `name`, right after its bytes."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Directory:
    """Here comes `ZipLayout.directory`, at the end of the file."""

    size_bytes: int


Piece = Literal | Storage | Descriptor | Directory


class _Entry(NamedTuple):
    """An entry of the new archive at a byte of the file: contents known from the start, or the storage of a tensor."""

    path: bytes
    header_at: int
    content: bytes | TensorSpec

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.size_bytes

    def fields(self, version: int, crc32: int, extra: bytes) -> tuple[int, ...]:
        """What local and central header have in common, in their order: from the version to the length of the extra field."""
        flags = _UTF8 if isinstance(self.content, bytes) else _UTF8 | _CRC_FOLLOWS
        shown = min(self.size_bytes, _MAX32)
        return version, flags, 0, 0, _JANUARY_1980, crc32, shown, shown, len(self.path), len(extra)


@dataclass(frozen=True, slots=True)
class ZipLayout:
    """A torch archive before it is written. Its `pieces`, one after another and without gaps, are the file."""

    file: str
    size_bytes: int
    tensors: tuple[StoredTensor, ...]
    pieces: tuple[Piece, ...]
    _entries: tuple[_Entry, ...]
    _sizes: Mapping[str, int]

    def descriptor(self, name: str, crc32: int) -> bytes:
        """The bytes of the `Descriptor` piece of a tensor; `crc32` is `zlib.crc32` of the tensor's bytes."""
        size = self._sizes[name]
        return struct.pack("<4sI2Q" if size >= _MAX32 else "<4s3I", _DESCRIPTOR_MARK, crc32, size, size)

    def directory(self, crc32: Mapping[str, int]) -> bytes:
        """The bytes of the `Directory` piece; `crc32` has `zlib.crc32` for the name of every `Storage` piece."""
        return _directory(self._entries, crc32, self.size_bytes - self.pieces[-1].size_bytes)


def layout_torch_zip(specs: Sequence[TensorSpec], same_storage: Mapping[str, str], file: str) -> ZipLayout:
    """Lay out a new archive that `torch.load` opens, memory-mapped or not, as a flat dict of the tensors in the given order.

    Args:
        specs: the tensors.
        same_storage: for a name, the earlier name whose bytes it shares.
        file: the file's path relative to its model directory; its stem names the top folder.

    Raises:
        InvalidInput: a name occurs twice, or is to share the bytes of something that is not earlier, or of another type or size.
    """
    owners = _storage_owners(specs, same_storage)
    stored = [spec for spec in specs if owners[spec.name] is spec]
    keys = {spec.name: str(index) for index, spec in enumerate(stored)}
    contents: list[tuple[str, bytes | TensorSpec]] = [
        ("data.pkl", _state_pickle((spec, keys[owners[spec.name].name]) for spec in specs)),
        # `.format_version` is left out: it would let torch compute the places of storages from the habits of its own writer
        ("byteorder", b"little"),
        *((f"data/{keys[spec.name]}", spec) for spec in stored),
        ("version", b"3\n"),
    ]
    entries, pieces, places, at = list[_Entry](), list[Piece](), dict[str, int](), 0
    for name, content in contents:
        entries.append(_Entry(f"{PurePosixPath(file).stem}/{name}".encode(), at, content))
        added = _pieces(entries[-1])
        if isinstance(content, TensorSpec):
            places[content.name] = at + added[0].size_bytes
        at += sum(piece.size_bytes for piece in added)
        pieces.extend(added)
    sizes = {spec.name: spec.size_bytes for spec in stored}
    end = Directory(len(_directory(entries, dict.fromkeys(sizes, 0), at)))
    tensors = tuple(StoredTensor(spec, file, places[owners[spec.name].name]) for spec in specs)
    return ZipLayout(file, at + end.size_bytes, tensors, (*pieces, end), tuple(entries), sizes)


def _storage_owners(specs: Sequence[TensorSpec], same_storage: Mapping[str, str]) -> dict[str, TensorSpec]:
    """For every name the tensor whose storage it lies in."""
    owners: dict[str, TensorSpec] = {}
    for spec in specs:
        owner = owners.get(same_storage[spec.name]) if spec.name in same_storage else spec
        if spec.name in owners:
            raise InvalidInput("specs", spec.name, "occurs twice")
        if owner is None or (owner.dtype, owner.size_bytes) != (spec.dtype, spec.size_bytes):
            raise InvalidInput("same_storage", spec.name, "needs an earlier tensor of the same type and size")
        owners[spec.name] = owner
    return owners


def _pieces(entry: _Entry) -> list[Piece]:
    """Local header, data, and the descriptor where the checksum is known only after the data."""
    if isinstance(entry.content, bytes):
        return [Literal(_local_header(entry, zlib.crc32(entry.content)) + entry.content)]
    name, size = entry.content.name, entry.size_bytes
    return [Literal(_local_header(entry, 0)), Storage(name, size), Descriptor(name, 24 if size >= _MAX32 else 16)]


def _local_header(entry: _Entry, crc32: int) -> bytes:
    """The header before an entry's data, padded as torch pads it: a mapped tensor then begins at a multiple of 64 bytes."""
    size = entry.size_bytes
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= _MAX32 else b""
    padding = -(entry.header_at + _LOCAL.size + len(entry.path) + len(extra) + 4) % _ALIGNMENT_BYTES
    version = 45 if extra else 20
    extra += struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return _LOCAL.pack(_LOCAL_MARK, *entry.fields(version, crc32, extra)) + entry.path + extra


def _directory(entries: Sequence[_Entry], crc32: Mapping[str, int], start: int) -> bytes:
    """The central directory that begins at byte `start`, with its end records; the 64-bit ones always, as torch does."""
    headers = [_central_header(entry, crc32) for entry in entries]
    count, size = len(entries), sum(map(len, headers))
    headers.append(_END64.pack(_END64_MARK, _END64.size - 12, 45, 45, 0, 0, count, count, size, start))
    headers.append(_LOCATOR.pack(_LOCATOR_MARK, 0, start + size, 1))
    shown = min(count, _MAX16), min(count, _MAX16), min(size, _MAX32), min(start, _MAX32)
    return b"".join(headers) + _END.pack(_END_MARK, 0, 0, *shown, 0)


def _central_header(entry: _Entry, crc32: Mapping[str, int]) -> bytes:
    checksum = zlib.crc32(entry.content) if isinstance(entry.content, bytes) else crc32[entry.content.name]
    wide = [number for number in (entry.size_bytes, entry.size_bytes, entry.header_at) if number >= _MAX32]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = 45 if wide else 20
    places = 0, 0, 0, 0, min(entry.header_at, _MAX32)
    head = _CENTRAL.pack(_CENTRAL_MARK, version, *entry.fields(version, checksum, extra), *places)
    return head + entry.path + extra


def _state_pickle(tensors: Iterable[tuple[TensorSpec, str]]) -> bytes:
    """A dict of names to tensors, each with the key of its storage; in protocol 2, as torch writes it."""
    items = b"".join(_plain(spec.name) + _tensor_pickle(spec, key) for spec, key in tensors)
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor_pickle(spec: TensorSpec, key: str) -> bytes:
    """The call that rebuilds a tensor from its storage; torch has no storage classes for its newer dtypes and names those apart."""
    name = _STORAGE_CLASSES.get(spec.dtype)
    storage_class = _global("torch", name) if name else _global("torch.storage", "UntypedStorage")
    place = _plain(key) + _plain("cpu") + _plain(spec.elements if name else spec.size_bytes)
    storage = pickle.MARK + _plain("storage") + storage_class + place + pickle.TUPLE + pickle.BINPERSID
    view = _plain(0) + _plain(spec.shape) + _plain(_row_major(spec.shape))
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    dtype = b"" if name else _global("torch", spec.dtype.long_name)
    rebuild = _global("torch._utils", "_rebuild_tensor_v2" if name else "_rebuild_tensor_v3")
    return rebuild + pickle.MARK + storage + view + pickle.NEWFALSE + hooks + dtype + pickle.TUPLE + pickle.REDUCE


def _plain(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes of a plain value: its own pickle without the protocol in front and the stop behind."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
