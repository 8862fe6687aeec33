"""What lies in a folder or bucket, and whether it is still the same.

What belongs here: listing a local folder or a bucket URL, the digest of a listing, reading one file
of it. What does not: which files are posters (`landing`) and what follows when a listing changed
(`arrivals`).

A bucket is anything that fsspec opens by URL: `s3://`, `gs://`, `abfs://`, `memory://`. Its
options (endpoint, anonymous access) come from fsspec's own configuration, such as the variable
`FSSPEC_S3_ENDPOINT_URL`; credentials from where each provider's tools keep them.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import posixpath
import re
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from posterpipe.core.parallel import cores

FETCHES = 32
"""Objects of a bucket fetched at the same time: they wait for the network, not for a core."""

_AT_THE_DISK = 4
"""Files of a folder that are being read, or kept, while every core works on another one."""

DEEPEST = 100
"""Nested folders that are entered, one in another; what lies deeper is a problem's entry."""

GIVEN_UP_SECONDS = 3600.0
"""A listing that began so long ago is waited for no more: another one is begun."""

UNLISTED = "this folder cannot be listed"
"""How the problem begins of a nested folder of which nobody knows what lies in it."""

_OF_THE_DISK = "lost+found"
"""Lies at the root of a disk, and may be entered by nobody but its administrator."""

_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "version_id")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")


class PlaceMissing(Exception):
    """A folder or bucket cannot be listed. The message names it and says what to do."""


class SourceChanged(Exception):
    """A file is not the one that was listed any more, or changed while it was read."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a place is for, in the names by which people can mend it."""

    setting: str
    """The variable that says where the place is."""
    asset: str
    """The asset that reads the place when it is materialized."""


LANDING = Role("POSTERPIPE_LANDING", "raw_posters")
HOLDOUT = Role("POSTERPIPE_HOLDOUT", "holdout_posters")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a listing. As long as nothing here changes, its bytes are taken as unchanged."""

    name: str
    """Path inside the place, posix. Bytes that are no UTF-8 are kept as surrogates."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Last change, nanoseconds since 1970; 0 where the place does not tell."""
    identity: str
    """Inode number, or ETag or version of an object."""
    mode: int = 0
    """Permission bits of a local file: one that becomes readable is another listing."""
    problem: str = ""
    """Why a folder could not be entered, or a file cannot be opened by its name; else ""."""


class Place(ABC):
    """A folder or bucket with files in it."""

    location: str
    """Absolute path or URL, for people: without its password."""
    threads: int
    """How many files are worth reading at the same time."""
    role: Role
    """What messages about the place tell people to set or to materialize."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """All files, nested ones included, sorted by name; hidden ones are left out.

        Raises PlaceMissing.
        """

    @abstractmethod
    def read(self, entry: Entry) -> bytes:
        """The bytes of a file. Raises SourceChanged, and OSError where it cannot be read."""

    @abstractmethod
    def sha256(self, entry: Entry) -> str:
        """Hash (hex) of a file of any size, in constant memory. Raises as `read`."""

    @abstractmethod
    def key(self, entry: Entry) -> str:
        """Where the file is, as text without surrogates: equal for no two files anywhere."""


def open_place(
    location: Path | str | Place, root: Path | None = None, role: Role = LANDING
) -> Place:
    """The folder or bucket at `location`; relative paths start at `root` (default: where we are).

    A `file://` URL is a local folder. A place that is one already keeps its role. Nothing is opened
    yet.
    """
    if isinstance(location, Place):
        return location
    text = str(location)
    if text.startswith("file://"):
        return Folder(Path(unquote(urlsplit(text).path)), role)
    if is_url(location):
        return Bucket(text, role)
    return Folder((root or Path.cwd()) / location, role)


def entries_within(place: Place, seconds: float) -> list[Entry]:
    """`place.entries()`, unless that takes longer. Raises PlaceMissing, also then.

    A listing that takes longer goes on, and the next call takes what comes out of it instead of
    beginning another one: so a bucket is listed that needs longer, and one that hangs has one
    thread, not one a call.
    """
    listing = _begun(place)
    if not wait([listing], seconds).done:
        raise PlaceMissing(
            f"{place.location}: did not answer within {seconds:g} s; check the address, the "
            f"network and the credentials, or set {place.role.setting} to another folder or URL"
        )
    with _BEGINNING:
        if place.location in _UNDER_WAY and _UNDER_WAY[place.location][1] is listing:
            del _UNDER_WAY[place.location]
    return listing.result()


_UNDER_WAY: dict[str, tuple[float, Future[list[Entry]]]] = {}
"""Listings, by location, of which nobody has taken what comes out, and when they began."""

_BEGINNING = threading.Lock()


def _begun(place: Place) -> Future[list[Entry]]:
    """The listing of a place that is under way; a new one where there is none."""
    with _BEGINNING:
        if place.location in _UNDER_WAY:
            began, listing = _UNDER_WAY[place.location]
            if time.monotonic() < began + GIVEN_UP_SECONDS:
                return listing
        listing = Future()
        _UNDER_WAY[place.location] = time.monotonic(), listing
    # None of an executor, for which the end of the process would wait.
    threading.Thread(target=_list, args=(place, listing), daemon=True).start()
    return listing


def _list(place: Place, listing: Future[list[Entry]]) -> None:
    try:
        listing.set_result(place.entries())
    except BaseException as error:  # raised where it is waited for
        listing.set_exception(error)


def is_url(location: Path | str) -> bool:
    """Whether a setting names a bucket by URL, not a folder."""
    return isinstance(location, str) and "://" in location


def listing_digest(entries: Iterable[Entry], *, portable: bool = False) -> str:
    """sha256 (hex) of a sorted listing: the same as long as no entry of it changes.

    `portable`: without what another host, or a container, may see otherwise of the same files:
    inode numbers and permissions.
    """
    digest = hashlib.sha256()
    for entry in entries:
        # Names hold no NUL, so no two listings give the same text.
        fields: tuple[object, ...] = (entry.name, entry.size, entry.mtime_ns)
        if not portable:
            fields += (entry.identity, entry.mode)
        line = "\0".join(map(str, fields)) + f"\0{entry.problem}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def suffix(name: str) -> str:
    """The extension of a file's name, with its dot; "" for none."""
    # As that of a path, which takes ten times as long to make: this is asked of every file, often.
    found = posixpath.splitext(name)[1]
    return "" if found == "." else found


def source_name(entry: Entry) -> str:
    """A file's name as tables keep it: bytes that are no UTF-8 replaced by `\\N{REPLACEMENT
    CHARACTER}`."""
    return entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Folder(Place):
    """A local folder. Links to files are followed, links to folders are not: they may run in
    circles."""

    def __init__(self, path: Path, role: Role = LANDING) -> None:
        self.role = role
        self.path = Path(os.path.abspath(path))
        self.location = str(self.path)
        self.threads = cores() + _AT_THE_DISK

    def entries(self) -> list[Entry]:
        """See `Place.entries`. A nested folder that cannot be entered is a problem's entry."""
        if self.path.exists() and not self.path.is_dir():
            raise PlaceMissing(
                f"{self.path}: this is a file; set {self.role.setting} to the folder of posters"
            )
        if not self.path.is_dir():
            raise PlaceMissing(
                f"{self.path}: this folder of posters is not there; create it and put posters in, "
                f"or set {self.role.setting} to another folder"
            )
        found: list[Entry] = []
        try:
            ahead = self._listed("", self.location, 0, found)
        except OSError as error:
            raise PlaceMissing(
                f"{self.path}: cannot be listed ({error.strerror}); make it readable"
            ) from error
        # One after the other, not by recursion: no depth of folders can exhaust the stack.
        while ahead:
            name, folder, depth = ahead.pop()
            try:
                ahead += self._listed(f"{name}/", folder, depth, found)
            except FileNotFoundError:
                continue  # taken away since it was listed
            except OSError as error:
                reason = f"{UNLISTED} ({error.strerror}); make it readable"
                found.append(Entry(name, 0, 0, "", problem=reason))
        found.sort(key=lambda entry: entry.name)
        return found

    def _listed(
        self, prefix: str, folder: str, depth: int, found: list[Entry]
    ) -> list[tuple[str, str, int]]:
        """Adds a folder's files to `found`; the folders in it: name, path and depth. Raises
        OSError where the folder cannot be listed, and adds nothing then."""
        with os.scandir(folder) as items:
            listed = [
                item
                for item in items
                if not item.name.startswith(".") and item.name != _OF_THE_DISK
            ]
        files: list[Entry] = []
        nested: list[tuple[str, str, int]] = []
        for item in listed:
            name = prefix + item.name
            try:
                if item.is_dir(follow_symlinks=False):
                    if depth < DEEPEST:
                        nested.append((name, item.path, depth + 1))
                        continue
                    reason = f"more than {DEEPEST} folders deep, so not entered; move it further up"
                    files.append(Entry(name, 0, 0, "", problem=reason))
                elif _leads_to_folder(item):
                    reason = "a link to a folder, which is not followed; copy the folder here"
                    files.append(Entry(name, 0, 0, "", problem=reason))
                else:
                    stats = _stat(item)
                    if stats is not None:
                        files.append(_local_entry(name, stats))
            except FileNotFoundError:
                continue  # taken away since it was listed
        found += files
        return nested

    def read(self, entry: Entry) -> bytes:
        """See `Place.read`."""
        with self._open(entry) as file:
            return file.read()

    def sha256(self, entry: Entry) -> str:
        """See `Place.sha256`."""
        with self._open(entry) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def key(self, entry: Entry) -> str:
        """See `Place.key`."""
        return os.fsencode(os.path.join(self.location, entry.name)).hex()

    @contextmanager
    def _open(self, entry: Entry) -> Iterator[BufferedReader]:
        path = os.path.join(self.location, entry.name)
        # A pipe that took the file's place must not make us wait for a writer.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            self._compare(entry, file)
            yield file
            self._compare(entry, file)

    def _compare(self, entry: Entry, file: BufferedReader) -> None:
        now = _local_entry(entry.name, os.fstat(file.fileno()))
        if (now.size, now.mtime_ns, now.identity) != (entry.size, entry.mtime_ns, entry.identity):
            raise SourceChanged(f"{os.path.join(self.location, entry.name)} changed")


def _leads_to_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:
        return False  # links in a circle, or through a folder that may not be entered


def _stat(item: os.DirEntry[str]) -> os.stat_result | None:
    """Of a file or a link to one; None for pipes, sockets and devices."""
    try:
        stats = item.stat()
    except OSError:
        if not item.is_symlink():
            raise
        stats = item.stat(follow_symlinks=False)  # a link to nowhere: said when it is read
    regular = stat.S_ISREG(stats.st_mode) or stat.S_ISLNK(stats.st_mode)
    return stats if regular else None


def _local_entry(name: str, stats: os.stat_result) -> Entry:
    mode = stat.S_IMODE(stats.st_mode)
    return Entry(name, stats.st_size, stats.st_mtime_ns, str(stats.st_ino), mode)


class Bucket(Place):
    """Objects below a URL, as fsspec lists them."""

    def __init__(self, url: str, role: Role = LANDING) -> None:
        self.role = role
        self.location = _without_password(url)
        self._url = url
        self.threads = FETCHES
        self._opened: tuple[Any, str] | None = None

    def entries(self) -> list[Entry]:
        """See `Place.entries`."""
        files, base = self._filesystem()
        try:
            found = _objects(files, base)
        except FileNotFoundError as error:
            raise PlaceMissing(
                f"{self.location}: this bucket is not there; create it, correct its name, or set "
                f"{self.role.setting} to another folder or URL"
            ) from error
        except Exception as error:  # each provider has its own
            raise PlaceMissing(
                f"{self.location}: cannot be listed ({_error_text(error)}); check the address, the "
                f"network and the credentials, or set {self.role.setting} to another folder or URL"
            ) from error
        entries = []
        for path, info in found.items():
            # One slash: names of objects may begin with another one.
            name = path[len(base) :].removeprefix("/") if path.startswith(base) else path
            hidden = any(part.startswith(".") for part in name.split("/"))
            # Objects whose name ends in / stand for folders.
            if name and not hidden and not name.endswith("/") and info.get("type") == "file":
                problem = _unopenable(files, f"{base}/{name}")
                entries.append(replace(_remote_entry(name, info), problem=problem))
        entries.sort(key=lambda entry: entry.name)
        return entries

    def read(self, entry: Entry) -> bytes:
        """See `Place.read`."""
        files, path = self._object(entry)
        data: bytes = _os_errors(files.cat_file, path)
        self._compare(entry, files, path)
        if len(data) != entry.size:
            raise SourceChanged(f"{self.location}: {entry.name} changed")
        return data

    def sha256(self, entry: Entry) -> str:
        """See `Place.sha256`."""
        files, path = self._object(entry)

        def hashed() -> str:
            digest = hashlib.sha256()
            with files.open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            return digest.hexdigest()

        value: str = _os_errors(hashed)
        self._compare(entry, files, path)
        return value

    def key(self, entry: Entry) -> str:
        """See `Place.key`."""
        return f"{self.location.rstrip('/')}/{entry.name}"

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None:
            from fsspec.core import url_to_fs

            try:
                # Its cache of listings would hide what arrives.
                files, base = url_to_fs(self._url, use_listings_cache=False)
            except ImportError as error:
                raise PlaceMissing(
                    f"{self.location}: {error}; `.venv/bin/pip install -e '.[cloud]'` in the "
                    "project's folder brings S3 and Google Cloud Storage"
                ) from error
            except Exception as error:  # each driver has its own
                if str(error).startswith("Protocol not known"):
                    raise PlaceMissing(
                        f"{self.location}: {error}; set {self.role.setting} to a folder, or a URL "
                        "such as s3://bucket/posters"
                    ) from error
                # Only the kind: the text of some of them holds the credentials.
                raise PlaceMissing(
                    f"{self.location}: cannot be opened ({type(error).__name__}); check the "
                    f"address, the network and the credentials, or set {self.role.setting} to "
                    "another folder or URL"
                ) from None
            self._opened = files, str(base).rstrip("/")
        return self._opened

    def _object(self, entry: Entry) -> tuple[Any, str]:
        files, base = self._filesystem()
        return files, f"{base}/{entry.name}"

    def _compare(self, entry: Entry, files: Any, path: str) -> None:
        now = _remote_entry(entry.name, _os_errors(files.info, path))
        # Listings and single objects may tell times to different digits: the ETag comes first.
        same = now.identity == entry.identity if entry.identity else now.mtime_ns == entry.mtime_ns
        if now.size != entry.size or not same:
            raise SourceChanged(f"{self.location}: {entry.name} changed")


def _objects(files: Any, base: str) -> dict[str, dict[str, Any]]:
    """What lies below a path. Raises FileNotFoundError where its bucket is not there."""
    try:
        found: dict[str, dict[str, Any]] = files.find(base, detail=True)
    except FileNotFoundError:
        bucket = base.partition("/")[0]
        if bucket and not files.exists(bucket):
            raise
        return {}  # some providers tell a path without objects in the same way
    return found


def _unopenable(files: Any, path: str) -> str:
    """Why an object cannot be opened by its name; "" where it can.

    s3fs takes `a?versionId=1.png` for a version of `a`, and tells which only where it was asked for
    versions. Other drivers have forms of their own.
    """
    if not hasattr(files, "split_path"):
        return ""
    bucket, key, *version = files.split_path(path)
    opened = f"{bucket}/{key}"
    if not any(version) and (opened == path or not path.startswith(opened)):
        return ""
    return "its name reads as the version of another object, so it cannot be opened; rename it"


def _os_errors(function: Any, *arguments: Any) -> Any:
    """The function's value; whatever a provider raises becomes an OSError."""
    try:
        return function(*arguments)
    except OSError:
        raise
    except Exception as error:
        raise OSError(_error_text(error)) from error


_PASSWORD = re.compile(r"(?<=://)([^/:@\s]*):(?:[^/\s]*|(?!\d*/)[^@\s]*)@")
"""Of a URL's user. One that holds a slash ought to be quoted, and is no less a password."""


def _without_password(text: str) -> str:
    """URLs in a text without the password of their user."""
    return _PASSWORD.sub(r"\1@", text)


def _error_text(error: Exception) -> str:
    return _without_password(f"{type(error).__name__}: {error}")


def _remote_entry(name: str, info: Mapping[str, Any]) -> Entry:
    identity = next((str(info[field]).strip('"') for field in _ETAGS if info.get(field)), "")
    changed = next((info[field] for field in _TIMES if info.get(field)), None)
    return Entry(name, int(info.get("size") or 0), _nanoseconds(changed), identity)


def _nanoseconds(moment: Any) -> int:
    """A time as providers tell it (datetime, ISO text or seconds), to the microsecond; 0 for none.

    One provider may tell the same time in two of these forms, and floats hold no nanoseconds.
    """
    if isinstance(moment, str):
        try:
            moment = dt.datetime.fromisoformat(moment)
        except ValueError:
            return 0
    if isinstance(moment, dt.datetime):
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        moment = moment.timestamp()
    return round(moment * 1_000_000) * 1_000 if isinstance(moment, int | float) else 0
