"""Stores behind URIs (s3://, gs://, hdfs://): opened without credentials in the text, waited for while they are down.

What is said of a store is said without what a URI may hold of secrets. Credentials come from where the store's own
client looks for them on each machine: the environment, its configuration files, the platform's identity.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from pyarrow import PythonFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, LocalFileSystem, PyFileSystem

from tunefleet.errors import Refused, RunFailed

PATIENCE_SECONDS = 300.0
"""How long a store may be out of reach before what needs it fails."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 10.0

# Stores of objects have no folders to make and no rename: a name with a slash in it is all there is.
OBJECT_STORES = frozenset({"s3", "gcs"})
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

# What a URI may say behind its question mark; everything else might be a secret and is not repeated.
_OPTIONS = {
    "s3": (
        "region",
        "scheme",
        "endpoint_override",
        "allow_bucket_creation",
        "allow_bucket_deletion",
        "tls_ca_file_path",
    ),
    "gs": ("scheme", "endpoint_override", "retry_limit_seconds", "project_id"),
    "hdfs": ("user", "replication", "buffer_size", "default_block_size"),
    "viewfs": ("user", "replication", "buffer_size", "default_block_size"),
    "file": (),
}
_ALIASES = {"gcs": "gs"}

_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|EXPIRED|TOKEN|"
    r"MISSING_AUTH|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED",
    re.IGNORECASE,
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket does not exist")
_FINAL = re.compile(r"HTTP status 4(?!08|29)\d\d|NOT_FOUND|INVALID_ARGUMENT|NOT_IMPLEMENTED|libjvm|libhdfs")
_LOST_CONNECTION = frozenset({errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""What a network file system says that may come back."""

_T = TypeVar("_T")


class StoreFailed(RunFailed):
    """A store refused what it was asked for, or was out of reach for too long."""


@dataclass(frozen=True)
class Opened:
    """A file system, the path on it, and the text before and behind the path in a URI that opens it again."""

    filesystem: FileSystem
    path: str
    before: str
    after: str


def open_uri(text: str) -> Opened:
    """Open a URI as a file system. Says nothing to the store, unless a bucket's region must be asked for.

    An S3-compatible server is named in the URI itself (`?endpoint_override=host:port&scheme=http`), which reaches every
    worker; where the URI names none, that of AWS_ENDPOINT_URL is written into it.

    Raises:
        Refused: the URI names no file system, holds credentials, or its store cannot be reached.
    """
    refuse_credentials(text)
    text = _with_endpoint(text)
    parts = urlsplit(text)
    refuse_unknown_scheme(text)
    shown = shown_uri(text)
    try:
        filesystem, path = FileSystem.from_uri(text)
    except (OSError, ValueError, ImportError) as error:
        raise Refused(f"{shown} cannot be opened ({reason(error)}); {_mend_to_open(parts.scheme)}.") from error
    # An object store's path starts with the bucket, which the URI keeps where other file systems have a host.
    if not path.strip("/") and filesystem.type_name in OBJECT_STORES:
        raise Refused(f"{shown} names no bucket; write one behind the two slashes.")
    host = "" if filesystem.type_name in OBJECT_STORES else parts.netloc
    if filesystem.type_name == "gcs" and parts.username:
        host = f"{parts.username}@"
    return Opened(filesystem, path, f"{parts.scheme}://{host}", f"?{parts.query}" if parts.query else "")


def refuse_unknown_scheme(uri: str) -> None:
    """See that a URI names a kind of file system that there is.

    Raises:
        Refused: it does not.
    """
    scheme = urlsplit(uri).scheme
    if _ALIASES.get(scheme, scheme) not in _OPTIONS:
        raise Refused(
            f"{shown_uri(uri)} cannot be opened: write a path, or a URI that begins with s3://, gs:// or hdfs://."
        )


def _mend_to_open(scheme: str) -> str:
    if scheme in ("hdfs", "viewfs"):
        return (
            "HDFS needs Java and Hadoop's native client on every machine: set JAVA_HOME, HADOOP_HOME and CLASSPATH (to "
            "what `hadoop classpath --glob` prints), and check the name of the host"
        )
    if scheme == "file":
        return "write the path alone, or file:///folder with its whole path"
    return "write a path or a URI such as s3://bucket/folder, and check its name, the network and the credentials"


def _with_endpoint(text: str) -> str:
    endpoint = next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), None)
    parts = urlsplit(text)
    if endpoint is None or parts.scheme != "s3" or "endpoint_override" in dict(parse_qsl(parts.query)):
        return text
    server = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    if server.username or server.password:
        raise Refused("AWS_ENDPOINT_URL holds credentials: leave them out, and set AWS_ACCESS_KEY_ID and its like.")
    return (
        f"{text}{'&' if parts.query else '?'}endpoint_override={quote(server.netloc, safe=':')}&scheme={server.scheme}"
    )


def refuse_credentials(text: str) -> None:
    """See that a URI holds no credentials. Paths pass.

    Raises:
        Refused: it does; what they are is not repeated.
    """
    if "://" not in text:
        return
    try:
        parts = urlsplit(text)
    except ValueError as error:  # not repeated either: it may hold a password
        raise Refused(f"This is no URI ({error}); write one such as s3://bucket/folder.") from error
    scheme = _ALIASES.get(parts.scheme, parts.scheme)
    named = {"hdfs": True, "viewfs": True, "gs": parts.username == "anonymous"}.get(scheme, False)
    secret = parts.password is not None or (parts.username is not None and not named)
    allowed = _OPTIONS.get(scheme)
    options = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if allowed is not None and not secret and not set(options) <= set(allowed):
        known = f"takes {', '.join(allowed)}" if allowed else "takes none"
        raise Refused(
            f"{shown_uri(text)} has an option that is none ({scheme}:// {known}); correct it, and put credentials into "
            "the environment of each machine or its platform's identity, never into a URI."
        )
    if secret:
        raise Refused(
            f"{shown_uri(text)} carries credentials, a password or a key; leave them out: they belong into the "
            f"environment of each machine (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or its platform's identity."
        )


def refuse_half_uri(path: str) -> None:
    """See that a path is none of `s3:bucket/folder`, which would make a folder of that name on this disk.

    Raises:
        Refused: it is.
    """
    scheme, colon, rest = path.partition(":")
    if colon and _ALIASES.get(scheme.lower(), scheme.lower()) in _OPTIONS:
        raise Refused(f"{path} is half a URI: write {scheme.lower()}://{rest.lstrip('/')}, or ./{path} for a folder.")


def shown_uri(text: str) -> str:
    """A URI with `...` for what may be secret in it: names and passwords before the host, values of unknown options."""
    if "://" not in text:
        return text
    parts = urlsplit(text)
    allowed = _OPTIONS.get(_ALIASES.get(parts.scheme, parts.scheme), ())
    host = parts.netloc.rpartition("@")[2]
    keeps_name = parts.scheme in ("hdfs", "viewfs") and parts.password is None
    user = f"{parts.username}@" if keeps_name and parts.username else "...@" if "@" in parts.netloc else ""
    options = parse_qsl(parts.query, keep_blank_values=True)
    shown = [f"{name}={value}" if name in allowed else "..." for name, value in options]
    return f"{parts.scheme}://{user}{host}{parts.path}{'?' if shown else ''}{'&'.join(shown)}"


def with_patience(work: Callable[[], _T], name: str, seconds: float = PATIENCE_SECONDS) -> _T:
    """Do `work`, and do it again while the store is out of reach. It must be such that it can be repeated.

    Args:
        name: what of the store it is about, for the sentence.
        seconds: how long to go on trying after the first failure.

    Raises:
        OSError: this machine's own disk failed, or what was to be read is not there.
        StoreFailed: the store refused, or was out of reach for too long.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            return work()
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno not in (None, *_LOST_CONNECTION):
                raise
            if not _may_pass(error):
                raise StoreFailed(f"{name} {_refusal(error)}.") from error
            if time.monotonic() - began + pause > seconds:
                raise StoreFailed(
                    f"{name} has been out of reach for {seconds:.0f} s ({reason(error)}): when the store is back, the "
                    f"same command goes on from the newest checkpoint."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _may_pass(error: OSError) -> bool:
    """Whether an error of a store is one of those that go away by themselves."""
    text = str(error)
    return not (_DENIED.search(text) or _NO_BUCKET.search(text) or _FINAL.search(text))


def _refusal(error: OSError) -> str:
    """What a store that answered says no to, and the mend."""
    text = str(error)
    if _DENIED.search(text):
        return (
            f"is refused by its store ({reason(error)}): give every machine credentials that may read, write and "
            "delete there, in its environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by its platform's identity"
        )
    if _NO_BUCKET.search(text):
        return "is in a bucket that does not exist: make the bucket, or correct the URI"
    return f"cannot be used ({reason(error)}): correct the URI"


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    code = re.search(r"AWS Error (\w+)(?: \((HTTP status \d+)\))?.*?operation: (.*)", text)
    if code is not None:
        text = f"{code[1]}: {code[3]}"
    return re.split(r"; Details:| \(Request ID", text)[0][:200].rstrip(". ")


# ---- the same patience for who is handed a file system ---------------------------------------------------------------


def for_ray(filesystem: FileSystem) -> FileSystem:
    """The same file system for Ray's own notes: one that waits for its store. What is written is held in memory.

    Ray gives up a run whose notes cannot be written at the first try. A local disk is left as it is.
    """
    return filesystem if isinstance(filesystem, LocalFileSystem) else PyFileSystem(_Patient(filesystem))


class _Patient(FileSystemHandler):  # type: ignore[misc]  # pyarrow carries no types
    """Passes on to another file system, again while its store is out of reach. Travels to Ray's processes by pickle."""

    def __init__(self, filesystem: FileSystem) -> None:
        self.inner = filesystem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Patient) and bool(self.inner == other.inner)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.inner.type_name)

    def get_type_name(self) -> str:
        return f"patient+{self.inner.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return with_patience(lambda: list(self.inner.get_file_info(paths)), ", ".join(paths))

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return with_patience(lambda: list(self.inner.get_file_info(selector)), selector.base_dir)

    def create_dir(self, path: str, recursive: bool) -> None:
        with_patience(lambda: self.inner.create_dir(path, recursive=recursive), path)

    def delete_dir(self, path: str) -> None:
        with_patience(lambda: self.inner.delete_dir(path), path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        with_patience(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok), path)

    def delete_root_dir_contents(self) -> None:
        raise Refused("A whole store is never emptied.")

    def delete_file(self, path: str) -> None:
        with_patience(lambda: self.inner.delete_file(path), path)

    def move(self, src: str, dest: str) -> None:
        with_patience(lambda: self.inner.move(src, dest), src)

    def copy_file(self, src: str, dest: str) -> None:
        with_patience(lambda: self.inner.copy_file(src, dest), src)

    def open_input_stream(self, path: str) -> Any:
        return with_patience(lambda: self.inner.open_input_stream(path), path)

    def open_input_file(self, path: str) -> Any:
        return with_patience(lambda: self.inner.open_input_file(path), path)

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        return PythonFile(_Held(self.inner, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError("objects cannot be appended to")


class _Held(io.BytesIO):
    """A small file that is written to its store as a whole when it is closed."""

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        super().__init__()
        self._filesystem, self._path = filesystem, path

    def close(self) -> None:
        if not self.closed:
            with_patience(lambda: _write(self._filesystem, self._path, self.getvalue()), self._path)
        super().close()


def _write(filesystem: FileSystem, path: str, content: bytes) -> None:
    if filesystem.type_name not in OBJECT_STORES:
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)
