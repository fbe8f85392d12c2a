"""A recipe that leaves this machine: every path in it must mean something on all pods of a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, parse_qs, urlsplit

from tunefleet.data.entries import FILE_TYPES, HUB_NAME
from tunefleet.data.settings import DEFAULT_FOLDER, read_pieces
from tunefleet.errors import Refused
from tunefleet.recipe.problems import Problem, RecipeError, shown
from tunefleet.secret_names import url_with_user
from tunefleet.stores import refuse_credentials, refuse_half_uri, shown_uri

MOUNT = "/mnt/tunefleet"
"""Where a claim is mounted, on the head and on every worker."""
STORAGE = "ray_storage_path"
_CLAIM = "pvc://"
RECIPE_FILE = "recipe.yaml"
"""What a recipe is called where it has been sent to."""
_STORES = ("s3://", "gs://", "hdfs://", "viewfs://")
_BUCKETS = {"s3": r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "gs": r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?"}


@dataclass(frozen=True)
class Storage:
    """Where runs are kept, and what of it is mounted."""

    uri: str
    """What `ray_storage_path` is in the cluster: a URI, or a path below the mount."""
    claim: str | None
    """The PersistentVolumeClaim that is mounted at `MOUNT`; None = a store behind a URI."""

    @property
    def ports(self) -> list[int]:
        """Where a store listens, or who knows a pod's identity there, if not at the usual port of HTTPS."""
        parts = urlsplit(self.uri)
        if parts.scheme == "gs":
            return [80, 988]  # GKE's metadata server, which gives a pod the token of its identity
        found = [re.search(r":(\d+)$", server.rstrip("/")) for server in _servers(parts)]
        plain = [80] if "scheme=http&" in f"{parts.query}&" else []
        return [int(one.group(1)) for one in found if one is not None] or plain


def storage_of(option: str | None, written: object) -> Storage:
    """The storage that `--storage` and the recipe's `ray_storage_path` mean.

    Raises:
        Refused: it is a folder of this machine, a store that is not taken, or no storage at all.
    """
    text = written if option is None else option
    if not isinstance(text, str) or not text:
        raise Refused(
            f"{STORAGE} is not written, and its default is a folder of this machine: add --storage s3://BUCKET/FOLDER, "
            "or --storage pvc://CLAIM for a ReadWriteMany claim."
        )
    refuse_credentials(text)
    if text.startswith(_STORES):
        _refuse_no_store(text)
        return Storage(text, None)
    if text.startswith(_CLAIM):
        claim, _, folder = text.removeprefix(_CLAIM).partition("/")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", claim) or ".." in PurePosixPath(folder).parts:
            raise Refused(f"{text} names no claim: write pvc://CLAIM, or pvc://CLAIM/FOLDER for a folder in it.")
        return Storage(str(PurePosixPath(MOUNT) / (folder.strip("/") or "runs")), claim)
    refuse_half_uri(text)
    if "://" in text and not text.startswith("file://"):
        taken = ", ".join(_STORES)
        raise Refused(
            f"{shown_uri(text)} begins with a scheme that is not taken: write one of {taken} or {_CLAIM}CLAIM[/FOLDER]."
        )
    raise Refused(
        f"{STORAGE}: {text} is a folder of this machine, which no pod can reach: add --storage s3://BUCKET/FOLDER, or "
        "--storage pvc://CLAIM for a ReadWriteMany claim."
    )


def _servers(parts: SplitResult) -> list[str]:
    """The servers that a store's URI names, each a host with or without a port; some write a scheme before it."""
    return [*parse_qs(parts.query).get("endpoint_override", []), *([parts.netloc] if parts.scheme == "hdfs" else [])]


def _refuse_no_store(text: str) -> None:
    """See that a URI names a bucket, and servers that can be."""
    parts = urlsplit(text)
    bucket = _BUCKETS.get(parts.scheme)
    if bucket is not None and not re.fullmatch(bucket, parts.netloc.removeprefix("anonymous@")):
        raise Refused(
            f"{shown_uri(text)} names no bucket: write {parts.scheme}://BUCKET/FOLDER, with small letters, digits, "
            "dots and hyphens in the bucket's name."
        )
    for server in filter(None, _servers(parts)):
        try:
            read = urlsplit(server if "://" in server else f"//{server}")
            right = bool(read.hostname) and read.port != 0 and (parts.scheme == "hdfs" or read.username is None)
        except ValueError:  # as of a port that is no number
            right = False
        if not right:  # not repeated: it may hold a password
            raise Refused(
                f"The server in {STORAGE} is none: write HOST:PORT with a port from 1 to 65535 and no user, as in "
                "s3://BUCKET/FOLDER?endpoint_override=minio:9000&scheme=http."
            )


def refuse_local(keys: Mapping[str, object], storage: Storage) -> None:
    """See that no key of a recipe names something that only this machine has.

    Raises:
        RecipeError: everything that does.
    """
    found = [*_models(keys, storage), *_data(keys, storage), *_others(keys, storage)]
    if found:
        raise RecipeError(found)


def refuse_users_in_urls(keys: Mapping[str, object], option: str) -> None:
    """See that no URL in a recipe that leaves this machine carries a user or a password.

    Args:
        option: how the command that sends it names a secret.

    Raises:
        RecipeError: some do; what they carry is not repeated.
    """
    found = [(key, scheme) for key, value in keys.items() if (scheme := url_with_user(value)) is not None]
    if found:
        mend = f"leave out what stands before the @, and let the program find it in a variable: {option}"
        raise RecipeError(
            Problem(key, f"has a URL with a user or a password in it ({scheme}://...@), and a recipe is copied", mend)
            for key, scheme in found
        )


def _models(keys: Mapping[str, object], storage: Storage) -> Iterator[Problem]:
    for key in ("model_name_or_path", "adapter_name_or_path"):
        for name in _pieces(keys.get(key)):
            if not _on_storage(name, storage) and not _on_hub(name):
                yield _local(key, name, storage, "the name of a model on the hub")


def _data(keys: Mapping[str, object], storage: Storage) -> Iterator[Problem]:
    folder = keys.get("dataset_dir") or DEFAULT_FOLDER
    names = [(key, name) for key in ("dataset", "eval_dataset") for name in _pieces(keys.get(key))]
    if isinstance(folder, str) and folder != "ONLINE" and not _on_storage(folder, storage):
        if folder != DEFAULT_FOLDER or (Path(folder) / "dataset_info.json").is_file():
            yield _local("dataset_dir", folder, storage, "ONLINE for data sets of the hub")
            return
        for key, name in names:
            if not _on_storage(name, storage) and (not _on_hub(name) or Path(name).suffix[1:] in FILE_TYPES):
                yield _local(key, name, storage, "the name of a data set on the hub")
        return
    for key, name in names:
        if "/" in name and not _on_storage(name, storage) and not _on_hub(name):
            yield _local(key, name, storage, "the name of a data set on the hub")


def _others(keys: Mapping[str, object], storage: Storage) -> Iterator[Problem]:
    tokens = keys.get("tokenized_path")
    if isinstance(tokens, str) and not _on_storage(tokens, storage):
        yield _local("tokenized_path", tokens, storage, None)
    start = keys.get("resume_from_checkpoint")
    if isinstance(start, str) and not _on_storage(start, storage) and not start.startswith(_STORES):
        yield _local("resume_from_checkpoint", start, storage, None)
    output = keys.get("output_dir")
    if isinstance(output, str) and (output.startswith(("/", "~")) and not _on_storage(output, storage)):
        what = f"{shown(output)} is a folder of this machine, and the head's container has none of that name"
        yield Problem("output_dir", what, f"write outputs/first; the model is kept under {STORAGE} all the same")
    if keys.get("ray_address") is not None:
        what = "names a cluster, and the job has one of its own"
        yield Problem("ray_address", what, "remove it, or write ray_address=null behind the recipe")


def _pieces(value: object) -> list[str]:
    """The names of a key that takes several; what is wrong with them is said where the recipe is read."""
    try:
        read = read_pieces(value)
    except ValueError:
        return []
    return [piece for piece in read if isinstance(piece, str)] if isinstance(read, tuple) else []


def _on_storage(path: str, storage: Storage) -> bool:
    inside = PurePosixPath(path)
    return storage.claim is not None and inside.is_relative_to(MOUNT) and ".." not in inside.parts


def _on_hub(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def _local(key: str, name: str, storage: Storage, other: str | None) -> Problem:
    folder = f"{MOUNT}/{PurePosixPath(name).name}"
    if storage.claim is None:
        place = f"put it on a ReadWriteMany claim, write {key}: {folder} and add --storage pvc://CLAIM"
    else:
        place = f"put it on the claim {storage.claim} and write {key}: {folder}"
    mend = place if other is None else f"{place}; or write {other}"
    return Problem(key, f"{shown(name)} is a path of this machine, which no pod can reach", mend)
