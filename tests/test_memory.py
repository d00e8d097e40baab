"""Decoded images that stay in memory, and how much of it there is."""

import pytest
from tiny import make_trainer, tiny_backbone  # noqa: F401

from utils import memory

pytestmark = pytest.mark.usefixtures("tiny_backbone")


@pytest.mark.parametrize(("choice", "free", "kept"), [
    ("auto", 1 << 30, True), ("auto", 1000, False), ("yes", 0, True), ("no", 1 << 30, False),
])  # fmt: skip
def test_decoded_images_are_kept_where_they_fit(tmp_path, monkeypatch, choice, free, kept):
    monkeypatch.setattr("utils.data.free_memory", lambda: free)
    loader = make_trainer(tmp_path, "--cache-images", choice).train_loader
    assert (loader.dataset.dataset.decoded is not None) is kept


def test_free_memory_is_within_the_limit_of_a_container(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("5000000\n")
    (tmp_path / "used").write_text("2000000\n")
    (tmp_path / "none").write_text("max\n")
    unlimited = [(tmp_path / "none", tmp_path / "used"), (tmp_path / "gone", tmp_path / "gone")]
    monkeypatch.setattr(memory, "_GROUP_FILES", unlimited)
    whole = memory.free_memory()
    assert whole > 5000000
    monkeypatch.setattr(memory, "_GROUP_FILES", [(tmp_path / "limit", tmp_path / "used")])
    assert memory.free_memory() == 3000000
