"""Archives: members of a zip or tar file become the files of a corpus."""

import contextlib
import errno
import gzip
import json
import lzma
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

from common.files import atomic_write
from corpus.sources import BLOCK, damage

GROWTH = 100  # times its size that an archive may grow to


def unpack(archive: Path, folder: Path, members: dict[str, str]) -> None:
    """Write members of a zip or tar archive into a folder.

    No name in the archive is used as a path, and links and devices are not files.

    Args:
        archive: path of the archive.
        folder: folder to write to.
        members: pattern of member names -> name of the file that they are written to. If it is a
            .jsonl file, each member becomes a line of it.

    Raises:
        ValueError: if the archive is damaged, grows to more than GROWTH times its size, or has no
            member for a pattern.
        OSError: if a file cannot be read or written.
    """
    with _open_archive(archive) as (sizes, open_member):
        if sum(sizes.values()) > GROWTH * archive.stat().st_size:
            raise _grows(archive)
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
    """(name -> size of each file in an archive, in order; a function that opens one)."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield {info.filename: info.file_size for info in archive.infolist()}, archive.open
            return
        with gzip.open(path) as unpacked:
            most = GROWTH * path.stat().st_size
            if unpacked.seek(most + 1) > most:  # before a header says how much to read at once
                raise _grows(path)
            unpacked.seek(0)
            with tarfile.open(fileobj=unpacked) as archive:
                files = {member.name: member for member in archive if member.isfile()}
                sizes = {name: member.size for name, member in files.items()}
                yield sizes, lambda name: archive.extractfile(files[name])
    except (
        zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, UnicodeDecodeError, RuntimeError,
        OSError, *damage(""),
    ) as error:  # fmt: skip
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise  # an error of the disk; EINVAL comes from a wrong offset in the archive
        raise ValueError(f"{path} is a damaged archive: {' '.join(str(error).split())}") from None


def _grows(path) -> ValueError:
    return ValueError(f"{path} grows to more than {GROWTH} times its size: it is not unpacked")
