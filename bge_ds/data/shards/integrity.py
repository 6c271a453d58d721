"""Shards against their manifest, byte by byte."""

from pathlib import Path

from bge_ds.data.files import hash_file
from bge_ds.data.shards import digests
from bge_ds.data.shards.manifest_file import MANIFEST, ShardEntry, fingerprint, read_manifest
from bge_ds.data.shards.memory_map import Shard, check_size
from bge_ds.data.shards.shard_reader import schemas


def check_hashes(folder: Path, base: Path) -> None:
    """Raises ValueError for the first shard that is missing, of another size, or of another hash than its manifest says.

    Hashes are remembered in `base` (see `digests`): a shard is read once, and again only when its file has changed."""
    entries = read_manifest(folder).shards
    paths = [folder / entry.file for entry in entries]
    for path, entry in zip(paths, entries, strict=True):
        check_size(path, entry)
    for path, entry, found in zip(paths, entries, digests.of_files(paths, base), strict=True):
        if found != entry.hash:
            raise ValueError(_flipped(path, entry, found))


def _flipped(path: Path, entry: ShardEntry, found: str) -> str:
    return f"{path}: corrupted shard, hash {found}, the manifest says {entry.hash}: copy the folder again, or preprocess again"


def verify_folder(folder: str | Path) -> list[str]:
    """Reads every byte: each shard's size, columns, rows and hash, and the manifest's own fingerprint.

    Returns the problems found, each naming its file: none when the folder is as it was written. Raises ValueError
    where the manifest itself cannot be read."""
    folder = Path(folder)
    manifest = read_manifest(folder, check=False)
    problems = []
    if fingerprint(manifest) != manifest.fingerprint:
        problems.append(f"{folder / MANIFEST}: its fingerprint is not that of its content: it was edited")
    fields = schemas(manifest.kind, manifest.tokenizer.vocab_size, manifest.max_seq_length or 0)
    for entry in manifest.shards:
        path = folder / entry.file
        try:
            check_size(path, entry)
            # First the hash: nothing of a shard with a flipped byte is interpreted.
            if (found := hash_file(path)) != entry.hash:
                raise ValueError(_flipped(path, entry, found))
            Shard(path, fields[entry.table], entry.rows)
        except ValueError as error:
            problems.append(str(error))
    named = {entry.file for entry in manifest.shards}
    strays = sorted(path for path in folder.glob("*.arrow") if path.name not in named)
    return problems + [f"{path}: the manifest does not name this shard" for path in strays]
