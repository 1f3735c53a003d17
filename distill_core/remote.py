"""Caches whose folder is a URL of fsspec, such as ``s3://bucket/cache``: files are copied here when they are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Final

from distill_core import cache_files
from distill_core.columns import Array
from distill_core.manifest import MANIFEST, CacheError, Manifest, check_file_list, read_json
from distill_core.reader import Reader
from distill_core.store import difference

_TRIES: Final = 5  # of a store that fails now and then
_WAIT: Final = 0.1  # seconds before the second try; each further one waits twice as long
_PIECE: Final = 2**20
_LARGEST_TEXT: Final = 2**26  # bytes of a manifest or a list of files
_LOCAL_BYTES: Final = 10 * 2**30


def is_url(path: str | PathLike[str]) -> bool:
    """Whether a path is a URL of fsspec.

    Raises:
        CacheError: If it is a Path that was made of a URL, which has lost a slash.
    """
    if isinstance(path, PurePath) and path.parts and re.fullmatch(r"[a-z][a-z0-9+.-]+:", path.parts[0]):
        raise CacheError(f"Expected a URL to be a string, but got {path!r}. Pass the string, without Path().")
    return isinstance(path, str) and "://" in path


def local_folder(path: str | PathLike[str]) -> Path:
    """The folder of a part of a cache, which must be on this machine.

    Raises:
        CacheError: If it is a URL.
    """
    if is_url(path):
        raise CacheError(
            f"Expected a part of a cache to be in a folder on this machine, but got {path}. Build and merge parts in"
            " folders; the merged cache may be at a URL."
        )
    return Path(path)


def open_reader(
    path: str | PathLike[str], local: str | PathLike[str] | None = None, local_bytes: int | None = None
) -> Reader:
    """A reader of a folder or of a URL.

    Args:
        path: The folder, or its URL.
        local: Where the files of a URL are kept; None is a folder of its own in the user's cache.
        local_bytes: How many bytes of them are kept; None is 10 GiB.

    Raises:
        CacheError: If it is not a complete cache, or a setting does not fit.
    """
    if is_url(path):
        return RemoteReader(RemoteFolder(str(path), local, _LOCAL_BYTES if local_bytes is None else local_bytes))
    if local is not None or local_bytes is not None:
        raise CacheError(
            f"Expected `local` and `local_bytes` to be None for a folder on this machine, but got {local!r} and"
            f" {local_bytes!r} for {path}. They are for a URL."
        )
    return Reader(Path(path))


@contextmanager
def building(path: str | PathLike[str], copies: bool = True) -> Iterator[Path]:
    """A context with the folder to build in, which is copied to its URL at the end if it has one.

    Args:
        path: The folder, or its URL.
        copies: Whether this process copies it: one of several that build together.
    """
    if not is_url(path):
        yield Path(path)
        return
    remote = RemoteFolder(str(path)).within("build")
    yield remote.local
    if copies:
        remote.upload()


class RemoteFolder:
    """A folder at a URL, and the part of it that is on this machine.

    Files that were not read for the longest time are removed to make room; processes share the local folder.

    Args:
        url: The URL. Its options and credentials are those that fsspec finds in its configuration and environment.
        local: The local folder; None is one in the user's cache, ``~/.cache/distill`` or ``$DISTILL_CACHE_DIR``.
        limit: How many bytes of arrays it may hold.

    Raises:
        CacheError: If fsspec or the store's own package is not installed, or ``limit`` is not 1 or more.
    """

    def __init__(self, url: str, local: str | PathLike[str] | None = None, limit: int = _LOCAL_BYTES) -> None:
        if type(limit) is not int or limit < 1:
            raise CacheError(f"Expected `local_bytes` to be a whole number of 1 or more, but got {limit!r}.")
        self.url, self.limit = url.rstrip("/"), limit
        digest = hashlib.blake2b(self.url.encode(), digest_size=16).hexdigest()
        place = os.environ.get("DISTILL_CACHE_DIR") or Path.home() / ".cache" / "distill"
        self.local = Path(place) / digest if local is None else Path(local)
        self._store: tuple[Any, str] | None = None
        self._process = 0
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "limit": self.limit, "local": self.local, "_store": None, "_process": 0}

    def within(self, name: str) -> RemoteFolder:
        """The same URL, with its files in a folder of that name below the local one."""
        return RemoteFolder(self.url, self.local / name, self.limit)

    def _connect(self) -> tuple[Any, str]:
        """The file system, which each process makes for itself, and the folder's path in it."""
        if self._store is None or self._process != os.getpid():  # connections do not survive a fork
            try:
                import fsspec

                self._store, self._process = fsspec.core.url_to_fs(self.url), os.getpid()
            except (ImportError, ValueError) as error:
                raise CacheError(
                    f"Expected fsspec to know the store of {self.url}, but: {error}. Install fsspec and the package of"
                    " the store."
                ) from None
        return self._store

    def fetch(self, name: str, size: int | None = None, fresh: bool = False) -> Path:
        """Copy a file here, unless it is here.

        Args:
            name: Its name.
            size: Its size in bytes; None for a manifest or a list.
            fresh: Whether to copy it again if it is here.

        Returns:
            The copy.

        Raises:
            CacheError: If the file does not exist, has another size, or the store fails every time.
        """
        path = self.local / name
        if not fresh and path.exists() and (size is None or path.stat().st_size == size):
            with suppress(OSError):
                os.utime(path)
            return path
        if size is not None:
            self._make_room(size)
        store, root = self._connect()
        self.local.mkdir(parents=True, exist_ok=True)
        # a name of its own, since several processes may fetch the same file
        temporary = path.with_name(f".{name}.{os.getpid()}.distill-partial")
        problem: Exception | None = None
        try:
            for attempt in range(_TRIES):
                time.sleep(_WAIT * 2 ** (attempt - 1) if attempt else 0)
                try:
                    self._copy(store, f"{root.rstrip('/')}/{name}", temporary, size)
                except FileNotFoundError:
                    raise CacheError(f"Expected {self.url}/{name} to exist, but it does not.") from None
                except CacheError:
                    raise
                except Exception as error:  # stores have errors of their own
                    problem = error
                    continue
                os.replace(temporary, path)
                return path
        finally:
            with suppress(OSError):
                temporary.unlink()
        raise CacheError(
            f"Expected {self.url}/{name} to be readable, but reading failed {_TRIES} times: {problem}"
        ) from problem

    def _copy(self, store: Any, place: str, path: Path, size: int | None) -> None:
        most, count = _LARGEST_TEXT if size is None else size, 0
        with store.open(place, "rb") as source, path.open("wb") as copy:
            while piece := source.read(_PIECE):
                count += len(piece)
                if count > most:
                    raise CacheError(
                        f"Expected {self.url}/{path.name[1:]} to have {most} bytes at most, but it has more."
                    )
                copy.write(piece)
        if size is not None and count != size:
            raise OSError(f"got {count} of {size} bytes")
        if size is None:
            json.loads(path.read_bytes())  # raises if it was cut off

    def forget(self, name: str) -> None:
        """Remove the local copy of a file."""
        with suppress(OSError):
            (self.local / name).unlink()

    def _make_room(self, size: int) -> None:
        """Remove the arrays that were not read for the longest time until another fits."""
        if size > self.limit:
            raise CacheError(
                f"Expected `local_bytes` to hold a file of {size} bytes, but got {self.limit}. Pass a larger number."
            )
        kept = []
        for path in self.local.glob("*.npy") if self.local.exists() else ():
            with suppress(OSError):  # another process may remove it
                facts = path.stat()
                kept.append((facts.st_mtime, facts.st_size, path))
        total = sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if total + size <= self.limit:
                return
            with suppress(OSError):
                path.unlink()  # a process that reads it keeps its own hold
            total -= bytes_

    def upload(self) -> None:
        """Copy the complete cache of the local folder to the URL, the manifest last; shards that are there stay.

        Raises:
            CacheError: If the URL holds another cache, or the store cannot be written.
        """
        store, root = self._connect()
        places = {path.name: f"{root.rstrip('/')}/{path.name}" for path in self.local.glob("*.*")}
        lists = sorted(name for name in places if name.startswith("shard-") and name.endswith(".json"))
        try:
            store.makedirs(root, exist_ok=True)
            self._check_other(store, places[MANIFEST])
            for last in [*lists, MANIFEST]:  # a shard's list of checksums tells its arrays from those of another build
                stem = last.removesuffix("json")
                arrays = sorted(name for name in places if name.startswith(stem) and name.endswith(".npy"))
                kept = store.exists(places[last])
                if kept and store.cat_file(places[last]) != (self.local / last).read_bytes():
                    kept = False
                    store.rm_file(places[last])
                for name in [*arrays, last]:
                    path, place = self.local / name, places[name]
                    if not (kept and store.exists(place) and store.info(place)["size"] == path.stat().st_size):
                        store.put_file(str(path), place)
        except CacheError:
            raise
        except Exception as error:
            raise CacheError(
                f"Expected {self.url} to be writable, but: {type(error).__name__}: {error}. The cache is complete in"
                f" {self.local}; call it again to copy the rest."
            ) from error

    def _check_other(self, store: Any, place: str) -> None:
        """Raise an error if the URL holds a cache with other contents than the local folder."""
        if not store.exists(place):
            return
        path = self.local / MANIFEST
        before, built = (Manifest.from_json(content, path) for content in (store.cat_file(place), path.read_bytes()))
        if words := difference(before, built):
            raise CacheError(
                f"Expected {self.url} to be empty or to hold the same cache, but {words}. Remove it, or choose another"
                f" URL. The new cache is complete in {self.local}; call it again to copy it."
            )


class RemoteReader(Reader):
    """Reads rows of a cache at a URL. A missing file is noticed when it is read.

    Args:
        remote: The folder.

    Raises:
        CacheError: If it does not hold a complete cache.
    """

    def __init__(self, remote: RemoteFolder) -> None:
        file = remote.fetch(MANIFEST, fresh=True)  # a copy may be of an earlier cache at the same place
        manifest = Manifest.from_json(file.read_bytes(), file)
        # a folder for each manifest: files of an earlier cache at this place are never taken for those of this one
        remote = remote.within(cache_files.checksum(file))
        self.__setstate__({"folder": remote.local, "manifest": manifest, "remote": remote})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.remote: RemoteFolder = state["remote"]

    def _map(self, shard: int, name: str, column: str) -> Array:
        file = cache_files.array_name(shard, name, column)
        if file not in self._open:
            size = self._files(shard)[file]["bytes"]
            self.remote.fetch(file, size)
            for other in [other for other in self._open if not (self.folder / other).exists()]:
                del self._open[other]  # removed to make room
            try:
                return super()._map(shard, name, column)
            except CacheError:  # the copy may have been damaged on its way
                self.remote.forget(file)
                self.remote.fetch(file, size)
        return super()._map(shard, name, column)

    def _files(self, shard: int) -> dict[str, Any]:
        if shard not in self._lists:
            name = cache_files.list_name(shard)
            if not (self.remote.local / name).exists():
                self.remote.fetch(name)
                self._check_same(name)
            file = self.remote.fetch(name)
            files = read_json(file.read_bytes(), file)
            needed = {cache_files.array_name(shard, *names) for names in self.manifest.columns}
            check_file_list(files, needed, file)
            self._lists[shard] = files
        return self._lists[shard]

    def _check_same(self, copied: str) -> None:
        """Raise an error, and forget a file that was copied, if another cache has taken the place of the opened one."""
        try:
            same = cache_files.checksum(self.remote.fetch(MANIFEST, fresh=True)) == self.remote.local.name
        except CacheError:
            self.remote.forget(copied)
            raise
        if not same:
            self.remote.forget(copied)
            raise CacheError(
                f"Expected {self.remote.url} to hold the cache that was opened, but another one has taken its place."
                " Open it again."
            )
