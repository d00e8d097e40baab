"""Arg max at label size, in slices of classes: bit for bit that of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, make_mapillary
from PIL import Image
from tiny import REINFORCE, figures, make_trainer, run, tiny_backbone  # noqa: F401

from dataloaders import build_dataset, val_transform
from utils.logger import RunLog
from utils.validation.evaluate import evaluate
from utils.validation.predict import predict, resize_labels

pytestmark = pytest.mark.usefixtures("tiny_backbone")
ONE_CLASS = 1  # byte: less than any class takes


def whole(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """All classes at once, at full size."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1)


@pytest.mark.parametrize("size", [(8, 16), (37, 53), (96, 64), (5, 7)])
@pytest.mark.parametrize("classes_a_slice", [1, 2, 7, 65])
def test_slices_equal_the_whole(size, classes_a_slice):
    logits = torch.randn(2, 65, 8, 16, generator=torch.Generator().manual_seed(0))
    slice_bytes = classes_a_slice * 4 * 2 * math.prod(size)
    assert torch.equal(predict(logits, size, slice_bytes), whole(logits, size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts(dtype, memory_format):
    logits = torch.randn(1, 19, 12, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = whole(logits, (50, 81))
    found = predict(logits.contiguous(memory_format=memory_format), (50, 81), ONE_CLASS)
    assert torch.equal(found, expected)
    assert found.dtype == torch.int64


def test_the_first_of_equal_scores_wins_across_slices():
    logits = torch.randint(0, 2, (1, 12, 6, 6), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(predict(logits, (6, 6), ONE_CLASS), logits.argmax(1))
    assert torch.equal(predict(torch.zeros(1, 5, 2, 2), (4, 4), ONE_CLASS), torch.zeros(1, 4, 4))


def test_not_a_number_wins_as_in_the_whole():
    logits = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    logits[0, [2, 4], 1, 1] = math.nan
    logits[0, 3, 2] = math.inf
    for slice_bytes in (ONE_CLASS, 2 * 4 * 16):
        assert torch.equal(predict(logits, (4, 4), slice_bytes), whole(logits, (4, 4)))


def test_scores_of_all_classes_are_never_there_at_once(monkeypatch):
    made = []
    resize = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda *args, **options: made.append(resize(*args, **options)) or made[-1]
    )
    predict(torch.zeros(1, 65, 75, 100), (300, 400), slice_bytes=2**21)
    assert [scores.shape[1] for scores in made] == [4] * 16 + [1]
    assert all(4 * scores.numel() <= 2**21 for scores in made)


def test_labels_at_another_size_take_the_nearest_pixel():
    label = torch.tensor([[[0, 255, 2, 3], [4, 5, 64, 7]]])
    assert resize_labels(label, (2, 4)) is label
    small = resize_labels(label, (2, 2))
    assert small.tolist() == [[[255, 3], [5, 7]]]
    assert small.dtype == torch.int64


@pytest.mark.gpu
def test_slices_equal_the_whole_on_cuda_in_memory_that_fits():
    logits = torch.randn(1, 65, 96, 128, device="cuda", dtype=torch.float16)
    logits = logits.contiguous(memory_format=torch.channels_last)
    expected = whole(logits.float().contiguous(), (750, 1000))
    for slice_bytes in (ONE_CLASS, 2**24):
        assert torch.equal(predict(logits, (750, 1000), slice_bytes), expected)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    predict(logits, (3000, 4000))
    everything = 65 * 3000 * 4000 * 4
    assert torch.cuda.max_memory_allocated() - before < everything / 3


# ---- --val-res ----


def test_val_transform_resizes_the_image_alone(tmp_path):
    data = build_dataset("mapillary", "val", make_mapillary(tmp_path), val_transform(128))
    shapes = [(tuple(image.shape), tuple(label.shape)) for image, label in map(data.sample, (0, 1))]
    assert shapes == [((3, 96, 128), (192, 256)), ((3, 213, 128), (160, 96))]
    with pytest.raises(ValueError, match="width is 0"):
        val_transform(0)


@pytest.mark.parametrize("policy", ["disabled", "reinforce", "oracle"])
def test_network_input_of_a_width_scores_at_the_size_of_the_labels(tmp_path, policy):
    layout = LAYOUTS["mapillary"]
    root = make_mapillary(tmp_path / "data")
    flags = [*layout.flags(root), "--res", "128", "--crop-res", "64", "--max-steps", "1"]
    flags += [*REINFORCE, "--segblocks-policy", policy, "--val-res", "128"]
    folder = run(tmp_path, *flags)
    more = ["--segblocks-calibrate", "val"] if policy == "reinforce" else []
    more += ["--policy-metrics", "yes", "--viz", "policy", "pred"]
    run(tmp_path, *flags, *more, "--mode", "val")
    found = figures(folder, "val.json")
    assert 0 <= found["miou"] <= 1
    assert 0 <= found["policy_metrics"]["boundary_miou"] <= 1
    picture = Image.open(folder / "viz/pred/frame0.png")
    assert picture.size == (128, 96)  # of the image, as the network sees it


def test_scores_are_those_of_predictions_at_label_size(tmp_path):
    root = make_mapillary(tmp_path / "data")
    flags = [*LAYOUTS["mapillary"].flags(root), "--res", "128", "--val-res", "64"]
    trainer = make_trainer(tmp_path, *flags)
    with RunLog(tmp_path / "log") as log:
        found = evaluate(trainer.model, trainer.val_loader, trainer.args, trainer.device, log)
    trainer.model.eval()
    right = labelled = 0
    native = build_dataset("mapillary", "val", root)
    for i in range(2):
        image, _ = build_dataset("mapillary", "val", root, val_transform(64))[i]
        assert image.shape[-1] == 64
        label = native[i][1].long()[None]
        with torch.no_grad():
            prediction = whole(trainer.model(image[None]).logits, label.shape[-2:])
        right += int((prediction == label).sum())
        labelled += int((label != 255).sum())
    assert found.overall_accuracy == pytest.approx(right / labelled)
