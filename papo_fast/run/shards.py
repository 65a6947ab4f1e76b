"""The files of a checkpoint: read without running what stands in them, and known by checksums."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from papo_fast.errors import InputError
from papo_fast.run.same_data import sha256

MANIFEST = "manifest.json"

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *(
        (f"{_DCP}metadata", name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
}
"""What `.metadata` of torch's distributed checkpoints is made of; dtypes are allowed besides."""


class _ClosedList(pickle.Unpickler):
    """Reads what is made of the classes above; a pickle can otherwise call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")


class SafeReader(FileSystemReader):
    """torch's reader, whose `.metadata` cannot run code.

    Raises `InputError` for one that names anything else than checkpoints are made of.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _ClosedList(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise InputError(f"{path} holds a {type(metadata).__name__} in place of metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which unpickles what is no tensor; this one takes plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)  # raises where it is anything else
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def write_manifest(folder: Path) -> None:
    """Checksums of all files of a checkpoint, as the last one of them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {str(p.relative_to(folder)): sha256(p) for p in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Older ones without a manifest pass."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        missing = [n for n in ("state.pt", "shards/.metadata") if not (folder / n).is_file()]
        return f"{missing[0]} is missing" if missing else None
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        for name, wanted in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if sha256(path) != wanted:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error!r})"
    return None
