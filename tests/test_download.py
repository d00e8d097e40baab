"""Downloads from a server on this machine: once, whole, checked, continued where they broke."""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from web import PAYLOAD

from utils import download
from utils.checkpoint import load_checkpoint, load_weights
from utils.download import cached, fetch, is_url


def files_in_cache(tmp_path) -> set[str]:
    """But for the lock files."""
    found = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    return {p.name for p in found if p.suffix != ".lock"}


def test_a_file_is_downloaded_once_to_the_cache_of_torch_hub(server, tmp_path):
    url = server.url("/models/checkpoint_best.pth")
    path = fetch(url)
    assert path.read_bytes() == PAYLOAD
    assert path.parent == tmp_path / "cache" / "hub" / "checkpoints"
    assert path.name.startswith("checkpoint_best-")
    assert path.suffix == ".pth"
    assert fetch(url) == path
    assert server.asked() == [None]
    assert files_in_cache(tmp_path) == {path.name}


def test_files_of_one_name_are_kept_apart(server):
    a = fetch(server.url("/a/checkpoint_best.pth", b"a"))
    b = fetch(server.url("/b/checkpoint_best.pth", b"b"))
    assert (a.read_bytes(), b.read_bytes()) == (b"a", b"b")


def test_callers_at_the_same_time_download_once(server):
    url = server.url("/a.pth")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, [url] * 4))
    assert len(paths) == len(server.asked()) == 1


# ---- broken connections ----


def test_a_broken_download_goes_on_in_the_same_call(server):
    server.breaks_after = 60_000
    assert fetch(server.url("/a.pth")).read_bytes() == PAYLOAD
    assert server.asked() == [None, "bytes=60000-"]


def test_a_download_that_stays_short_is_refused_and_goes_on_later(server, tmp_path):
    server.breaks_after = 10_000
    url = server.url("/a.pth")
    with pytest.raises(OSError, match=r"a\.pth: the download broke after 30000 bytes .*goes on"):
        fetch(url)
    assert not cached(url).exists()
    server.asked()
    server.breaks_after = None
    assert fetch(url).read_bytes() == PAYLOAD
    assert server.asked() == ["bytes=30000-"]
    assert files_in_cache(tmp_path) == {cached(url).name}


@pytest.mark.parametrize("validator", ['"v2"', None])
def test_a_file_that_changed_meanwhile_starts_again(server, validator):
    server.breaks_after, server.validator = 10_000, validator and '"v1"'
    url = server.url("/a.pth")
    with pytest.raises(OSError, match="broke"):
        fetch(url)
    other = PAYLOAD[::-1] + b"longer"
    server.files["/a.pth"], server.validator, server.breaks_after = other, validator, None
    assert fetch(url).read_bytes() == other


def test_a_server_without_ranges_starts_again(server):
    server.breaks_after, server.ranges = 10_000, False
    url = server.url("/a.pth")
    with pytest.raises(OSError, match="broke after 10000 bytes"):
        fetch(url)
    server.breaks_after = None
    assert fetch(url).read_bytes() == PAYLOAD


def test_a_whole_part_that_was_not_renamed_yet(server, monkeypatch):
    url = server.url("/a.pth")
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetch(url)
    assert fetch(url).read_bytes() == PAYLOAD


def test_notes_that_were_not_written_whole(server):
    server.breaks_after = 10_000
    url = server.url("/a.pth")
    with pytest.raises(OSError, match="broke"):
        fetch(url)
    (notes,) = cached(url).parent.glob("*.json")
    notes.write_text('{"total": 1')
    server.breaks_after = None
    assert fetch(url).read_bytes() == PAYLOAD


def test_unknown_length_needs_a_hash(server):
    server.length = None
    url = server.url("/a.pth")
    with pytest.raises(OSError, match=r"does not say how long the file is.*#sha256="):
        fetch(url)
    assert fetch(f"{url}#sha256={hashlib.sha256(PAYLOAD).hexdigest()}").read_bytes() == PAYLOAD


def test_a_full_disk_is_no_broken_connection(server, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(server.url("/a.pth"))
    assert server.asked() == [None]


def test_a_bar_shows_what_is_there_and_what_arrives(server, monkeypatch):
    bars = []

    class Bar(download.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(download, "tqdm", Bar)
    server.breaks_after = 60_000
    fetch(server.url("/some.pth"))
    assert [(bar.desc, bar.initial, bar.n, bar.total) for bar in bars] == [
        ("some.pth", 0, 60_000, len(PAYLOAD)),
        ("some.pth", 60_000, len(PAYLOAD), len(PAYLOAD)),
    ]


# ---- hashes and addresses ----


def test_the_right_hash(server):
    url, digest = server.url("/a.pth"), hashlib.sha256(PAYLOAD).hexdigest()
    path = fetch(f"{url}#sha256={digest.upper()}")
    assert path.read_bytes() == PAYLOAD
    assert fetch(url) == fetch(f"{url}#sha256={digest}") == path
    assert server.asked() == [None]


def test_another_hash_is_refused(server, tmp_path):
    url = server.url("/a.pth")
    with pytest.raises(ValueError, match=r"has SHA-256 \w{64} instead of 0{64}: it is refused"):
        fetch(f"{url}#sha256={'0' * 64}")
    assert files_in_cache(tmp_path) == set()
    fetch(url)
    with pytest.raises(ValueError, match=r"downloaded before .* instead of 0{64}; delete it"):
        fetch(f"{url}#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("end", "message"),
    [("#sha256=12", "64 hexadecimal digits"), ("#md5=12", "64 hexadecimal digits")],
)
def test_other_fragments_are_errors(server, end, message):
    with pytest.raises(ValueError, match=message):
        fetch(server.url("/a.pth") + end)
    assert server.asked() == []


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://example.org/a", "s3://a/b"])
def test_other_addresses_are_errors(address):
    with pytest.raises(ValueError, match="only http and https"):
        fetch(address)
    assert is_url(address)


def test_paths_are_no_addresses():
    assert not any(map(is_url, ["exp/a.pth", "/a/b.pth", "C:\\a.pth", "http", "a:b"]))


def test_what_the_server_refuses(server):
    address = server.url("/a.pth").replace("a.pth", "b.pth")
    with pytest.raises(FileNotFoundError, match=r"b\.pth: the server answers 404"):
        fetch(address)


def test_no_server(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot download http://127\.0\.0\.1:9/a.*check"):
        fetch("http://127.0.0.1:9/a.pth")
    assert files_in_cache(tmp_path) == set()


# ---- checkpoints ----


def file_of(state: object, tmp_path) -> bytes:
    torch.save(state, tmp_path / "state.pth")
    return (tmp_path / "state.pth").read_bytes()


def test_weights_load_from_an_address(server, tmp_path):
    source, target = nn.Linear(3, 4), nn.Linear(3, 4)
    url = server.url("/a.pth", file_of({"state_dict": source.state_dict()}, tmp_path))
    load_weights(target, url)
    assert torch.equal(target.weight, source.weight)


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_code_behind_an_address_is_refused(server, tmp_path):
    marker = tmp_path / "ran"
    url = server.url("/a.pth", file_of({"state_dict": RunsCode(str(marker))}, tmp_path))
    with pytest.raises(ValueError, match=r"refused: it asks to run code.*came from http://127"):
        load_checkpoint(url)
    assert not marker.exists()


def test_a_page_behind_an_address_is_no_checkpoint(server):
    with pytest.raises(ValueError, match=r"not a checkpoint.*came from http://.*delete it"):
        load_checkpoint(server.url("/a.pth", b"<html>please log in</html>"))
