"""Archives: members of a zip or tar archive become the sources of a corpus."""

import contextlib
import errno
import gzip
import json
import lzma
import re
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from common.files import atomic_write
from corpus.sources import BLOCK

MAX_GROWTH = 100  # most uncompressed bytes per byte of an archive


def unpack(archive: Path, folder: Path, members: dict[str, str]) -> None:
    """Write members of a zip or tar archive into a folder.

    No name in the archive is used as a path. Links and devices are left out.

    Args:
        archive: Path of the archive.
        folder: Folder to write to.
        members: Pattern of member names -> name of the file that the members are written to. In a
            .jsonl file, each member becomes one line.

    Raises:
        ValueError: The archive is damaged, grows to more than MAX_GROWTH times its size, or has no
            member for a pattern.
        OSError: A file cannot be read or written.
    """
    with _open_archive(archive) as (sizes, open_member):
        if sum(sizes.values()) > MAX_GROWTH * archive.stat().st_size:
            raise _grown_archive(archive)
        for pattern, target in members.items():
            chosen = [name for name in sizes if re.fullmatch(pattern, name)]
            if not chosen:
                raise ValueError(f"{archive} has no file for {target}: it is another archive")
            with atomic_write(folder / target) as out:
                for name in chosen:
                    with open_member(name) as f:
                        if target.endswith(".jsonl"):
                            row = {"text": f.read().decode(), "file": name}
                            out.write(json.dumps(row).encode() + b"\n")
                        else:
                            shutil.copyfileobj(f, out, BLOCK)


@contextlib.contextmanager
def _open_archive(path):
    """Yield (name -> size of each member in order, function that opens a member by its name)."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield {info.filename: info.file_size for info in archive.infolist()}, archive.open
            return
        with gzip.open(path) as unpacked:
            max_bytes = MAX_GROWTH * path.stat().st_size
            if unpacked.seek(max_bytes + 1) > max_bytes:  # checked before tarfile trusts a header
                raise _grown_archive(path)
            unpacked.seek(0)
            with tarfile.open(fileobj=unpacked) as archive:
                members = {member.name: member for member in archive if member.isfile()}
                sizes = {name: member.size for name, member in members.items()}
                yield sizes, lambda name: archive.extractfile(members[name])
    except (
        zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, UnicodeDecodeError, RuntimeError,
        OSError, EOFError, zlib.error,
    ) as error:  # fmt: skip
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise  # an error of the disk; EINVAL comes from a wrong offset in the archive
        raise ValueError(f"{path} is a damaged archive: {' '.join(str(error).split())}") from None


def _grown_archive(path) -> ValueError:
    """Return the error for an archive that grows to more than MAX_GROWTH times its size."""
    return ValueError(f"{path} grows to more than {MAX_GROWTH} times its size: it is not unpacked")
