"""Files from the web into a cache: each once, whole and checked; a broken download goes on."""

import hashlib
import http.client
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from tqdm import tqdm

ATTEMPTS = 3  # connections that may break in one call
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{64})")
BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError)


class Truncated(ConnectionError):
    """The connection ended before the file did."""


@dataclass
class Source:
    """What is known of the file on the server, kept beside a part of it.

    `validator` is its ETag or date, by which the server tells whether it is still the same.
    """

    total: int | None = None  # bytes
    validator: str | None = None


def is_url(source: str | os.PathLike) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(source)) is not None


def fetch(url: str) -> Path:
    """The local copy of a file at an http or https address, downloaded on first use.

    It lies in the folder checkpoints of `torch.hub.get_dir()`, which TORCH_HOME moves, and takes
    its name there only once it is whole. The address may end in "#sha256=" and 64 hexadecimal
    digits, which the file is then checked for. What arrived before a connection broke is kept and
    continued, in this call or in a later one, if the file on the server is the same.

    Raises ValueError for another kind of address and for a file of another hash,
    FileNotFoundError if the server has no such file or cannot be reached, OSError for a download
    that stays incomplete.
    """
    address, fragment = urldefrag(url)
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"{url}: only http and https addresses are downloaded; or give a file")
    digest = FRAGMENT.fullmatch(fragment)
    if fragment and not digest:
        raise ValueError(f"{url}: after # only sha256= and 64 hexadecimal digits are accepted")
    sha256 = digest[1].lower() if digest else None
    path = cached(address)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of several processes one downloads, the others wait
            if not path.is_file():
                _download(address, path, sha256)
    found = _sha256(path) if sha256 else None
    if found != sha256:
        raise ValueError(
            f"{path}, downloaded before from {address}, has SHA-256 {found} instead of {sha256}; "
            "delete it to download it again"
        )
    return path


def cached(address: str) -> Path:
    """Where `fetch` keeps the file of an address. Many are called checkpoint_best.pth, so a piece
    of the address's hash is part of the name."""
    name = Path(unquote(urlsplit(address).path)).name or "file"
    key = hashlib.sha256(address.encode()).hexdigest()[:8]
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{Path(name).stem}-{key}{Path(name).suffix}"


def _download(address: str, path: Path, sha256: str | None) -> None:
    part, notes = Path(f"{path}.part"), Path(f"{path}.part.json")
    for attempt in range(ATTEMPTS):
        try:
            _receive(address, part, notes, sha256 is not None)
            break
        except BROKEN as error:
            if attempt + 1 == ATTEMPTS:
                size = part.stat().st_size if part.exists() else 0
                raise OSError(
                    f"{address}: the download broke after {size} bytes ({error!r}); the same "
                    "command goes on from there"
                ) from error
    found = _sha256(part) if sha256 else None
    notes.unlink(missing_ok=True)
    if found != sha256:
        part.unlink()
        raise ValueError(
            f"{address} has SHA-256 {found} instead of {sha256}: it is refused; check the address"
        )
    os.replace(part, path)


def _receive(address: str, part: Path, notes: Path, checked: bool) -> None:
    """Make `part` whole over one connection; `Truncated` if that ends too early."""
    done = part.stat().st_size if part.exists() else 0
    known = _noted(notes)
    with _open(address, done, known) as response:
        source = _source(response, done)
        goes_on = response.status == 206 and source.total and source.total == known.total
        if response.status == 206 and not goes_on:
            part.unlink()
            raise Truncated("the file on the server has changed")
        if source.total is None and not (checked or response.chunked):
            raise OSError(
                f"{address}: the server does not say how long the file is, so a truncated one "
                "would not show; add #sha256=… to the address"
            )
        notes.write_text(json.dumps(asdict(source)))
        done = done if goes_on else 0
        with (
            open(part, "ab" if goes_on else "wb") as file,
            tqdm(
                desc=Path(urlsplit(address).path).name,
                total=source.total,
                initial=done,
                unit="B",
                unit_scale=True,
                disable=None,
                leave=False,
            ) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if source.total is not None and size != source.total:
        raise Truncated(f"{size} of {source.total} bytes arrived")


def _noted(notes: Path) -> Source:
    try:
        return Source(**json.loads(notes.read_text()))
    except (FileNotFoundError, ValueError):  # not written whole
        return Source()


def _open(address: str, done: int, known: Source) -> http.client.HTTPResponse:
    """The answer of the server: the rest from byte `done` (status 206), or the whole file (200)."""
    headers = {"User-Agent": "segblocks"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if known.validator:
            headers["If-Range"] = known.validator
    try:
        return urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and done:  # nothing is left: the part is whole, or not of this file
            return _open(address, 0, known)
        raise FileNotFoundError(
            f"cannot download {address}: the server answers {error.code} {error.reason}; check "
            "the address"
        ) from error
    except URLError as error:
        raise FileNotFoundError(
            f"cannot download {address} ({error.reason}); check the address and the connection"
        ) from error


def _source(response: http.client.HTTPResponse, done: int) -> Source:
    """`done` bytes were there before; a 206 answer that starts elsewhere has no known total."""
    headers = response.headers
    etag = headers.get("ETag", "")
    validator = headers.get("Last-Modified") if etag.startswith("W/") or not etag else etag
    if response.status == 206:
        start = re.fullmatch(rf"bytes {done}-\d+/(\d+)", headers.get("Content-Range", ""))
        return Source(int(start[1]) if start else None, validator)
    length = headers.get("Content-Length")
    return Source(int(length) if length is not None else None, validator)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
