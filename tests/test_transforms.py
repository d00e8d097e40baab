"""The joint pipeline: image and label stay together, borders are void, values as published."""

import colorsys

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from dataloaders import denormalise, to_network, train_transform, val_transform
from dataloaders.jitter import ColourJitter, hue
from dataloaders.transforms import MEAN, STD, _extend, _resize

CHANGES = ("brightness", "contrast", "saturation", "hue")

FILL = torch.tensor([73, 83, 72])  # the published mean, rounded


def _coded(h: int = 96, w: int = 192, cell: int = 24) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image of flat cells whose red value is 10 times the label."""
    rows = torch.arange(h)[:, None] // cell
    label = ((rows * 5 + torch.arange(w)[None] // cell * 3) % 20).to(torch.uint8)
    image = torch.stack([label * 10, 255 - label * 10, torch.full_like(label, 40)])
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def _pixels(image: torch.Tensor) -> torch.Tensor:
    return denormalise(image).to(torch.int64)


def _aligned_share(image: torch.Tensor, label: torch.Tensor) -> float:
    """Share of the valid pixels away from cell edges whose colour fits their label."""
    plain = torch.nn.functional.max_pool2d
    y = label[None].float()
    inside = (plain(y, 5, 1, 2) == y) & (-plain(-y, 5, 1, 2) == y)  # 1,H,W
    inside = inside[0] & (label != 255)
    assert inside.float().mean() > 0.15
    return ((_pixels(image)[0] - 10 * label).abs() <= 6)[inside].float().mean().item()


@pytest.mark.parametrize("rotate", [0, 20])
@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.6, 0.6), (1.7, 1.7)])
@pytest.mark.parametrize("crop_res", [64, (48, 80)])
@pytest.mark.parametrize("res", [192, 144])
def test_image_and_label_stay_aligned(rotate, scale, crop_res, res):
    transform = train_transform(res, crop_res, jitter=0, rotate=rotate, scale=scale)
    torch.manual_seed(0)
    for _ in range(8):
        image, label = transform(*_coded())
        assert image.shape[1:] == label.shape == torch.Size(torch.broadcast_to(
            torch.tensor(crop_res), (2,)).tolist())  # fmt: skip
        assert _aligned_share(image, label) > 0.97


def test_labels_are_resized_about_pixel_centres():
    """A symmetric picture stays symmetric: no half-pixel shift of labels against the image."""
    label = torch.zeros(96, 96, dtype=torch.uint8)
    label[:, 31:65] = 9
    image = tv_tensors.Image((label * 20).expand(3, -1, -1).contiguous())
    transform = train_transform(96, 32, jitter=0, rotate=0, scale=(3.0, 3.0))
    image, label = transform(image, tv_tensors.Mask(label))
    assert torch.equal(label, label.flip(-1))
    assert torch.equal(_pixels(image), _pixels(image).flip(-1))
    assert 0 < (label == 9).sum() < label.numel()


def test_types_and_shapes_of_the_result():
    image, label = train_transform(192, 64, 0.3, 5)(*_coded())
    assert type(image) is torch.Tensor
    assert type(label) is torch.Tensor
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    assert (image.shape, label.shape) == ((3, 64, 64), (64, 64))


def test_inputs_are_not_changed():
    image, label = _coded()
    kept = image.clone(), label.clone()
    train_transform(192, 64, 0.3, 5)(image, label)
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])


@pytest.mark.parametrize("old", [1, 2, 7, 191, 480, 853, 2048])
def test_labels_are_resized_as_by_torch(old):
    label = torch.randint(0, 256, (old, 9), dtype=torch.uint8)
    for label_ in (label, label.T):
        for size in [*range(1, 40), 384, 512, 639, 1024]:
            h, w = (size, 5) if label_ is label else (5, size)
            expected = F.resize(label_[None], [h, w], InterpolationMode.NEAREST_EXACT)[0]
            resized = _resize(tv_tensors.Mask(label_), (h, w))
            assert type(resized) is tv_tensors.Mask
            assert torch.equal(resized.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("size", [(5, 7), (5, 9), (8, 7), (8, 9)])
@pytest.mark.parametrize("planar", [False, True])
def test_images_are_extended_to_interleaved_channels(size, planar):
    image = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8).permute(2, 0, 1)
    image = image.contiguous() if planar else image
    out = _extend(tv_tensors.Image(image), *size).as_subclass(torch.Tensor)
    assert out.shape == (3, *size)
    assert out.permute(1, 2, 0).is_contiguous()
    expected = FILL.to(torch.uint8).view(3, 1, 1).repeat(1, *size)
    expected[:, :5, :7] = image
    assert torch.equal(out, expected)


def test_crop_larger_than_the_image_sits_top_left_on_mean_and_void():
    image, label = _coded(40, 60)
    transform = train_transform(60, 100, jitter=0, rotate=0, scale=(1.0, 1.0))
    for seed in range(4):
        torch.manual_seed(seed)
        out, out_label = transform(image, label)
        if not torch.equal(out_label[:40, :60], label.long()):  # flipped
            out, out_label = out.flip(-1), out_label.flip(-1)
        assert torch.equal(out_label[:40, :60], label.long())
        assert torch.equal(_pixels(out)[:, :40, :60], image.long())
        beyond = torch.ones(100, 100, dtype=torch.bool)
        beyond[:40, :60] = False
        assert (out_label[beyond] == 255).all()
        assert (_pixels(out)[:, beyond] == FILL[:, None]).all()


def test_rotation_fills_with_mean_and_void():
    image, label = tv_tensors.Image(torch.full((3, 80, 80), 250, dtype=torch.uint8)), None
    label = tv_tensors.Mask(torch.ones(80, 80, dtype=torch.uint8))
    torch.manual_seed(1)
    out, out_label = train_transform(80, 80, 0, 45, scale=(1.0, 1.0))(image, label)
    assert 0.01 < (out_label == 255).float().mean() < 0.5
    deep = torch.nn.functional.max_pool2d(-(out_label == 255).float()[None], 5, 1, 2)[0] == -1
    assert deep.any()
    assert (_pixels(out)[:, deep] == FILL[:, None]).all()


def test_scale_is_an_inverse_zoom():
    """s = 0.5 shows half the width of crop_res, so that things look twice as large."""
    counts = []
    for s in (0.5, 1.0, 2.0):
        ramp = torch.arange(256, dtype=torch.uint8).expand(128, 256).contiguous()
        image = tv_tensors.Image(torch.stack([ramp] * 3))
        transform = train_transform(256, 128, 0, 0, scale=(s, s))
        out, _ = transform(image, tv_tensors.Mask(torch.zeros_like(ramp)))
        row = _pixels(out)[0, 0]
        counts.append(int(row.max() - row.min()) + 1)
    assert counts == pytest.approx([64, 128, 256], abs=3)


def test_crop_reaches_every_position():
    image, label = _coded(64, 128)
    label = tv_tensors.Mask(torch.arange(128, dtype=torch.uint8).expand(64, 128).contiguous())
    transform = train_transform(128, 32, 0, 0, scale=(1.0, 1.0))
    torch.manual_seed(0)
    starts = {int(transform(image, label)[1].min()) for _ in range(600)}
    assert min(starts) <= 1
    assert max(starts) >= 95
    assert len(starts) > 80


def test_flip_is_one_half():
    image, label = _coded(16, 32, cell=8)
    transform = train_transform(32, (16, 32), 0, 0, scale=(1.0, 1.0))
    torch.manual_seed(0)
    flips = sum(
        torch.equal(transform(image, label)[1], label.as_subclass(torch.Tensor).long().flip(-1))
        for _ in range(200)
    )
    assert 70 < flips < 130


def test_jitter_zero_switches_off_hue_too_and_jitter_leaves_labels():
    image, label = _coded()
    args = {"res": 192, "crop_res": (96, 192), "rotate": 0, "scale": (1.0, 1.0)}
    seen = set()
    torch.manual_seed(0)
    for _ in range(6):
        plain, _ = train_transform(jitter=0, **args)(image, label)
        seen |= set(_pixels(plain)[2].unique().tolist())
        colourful, kept_label = train_transform(jitter=0.3, **args)(image, label)
        flipped = label.as_subclass(torch.Tensor).long().flip(-1)
        assert any(torch.equal(kept_label, x) for x in (label.long(), flipped))
        assert not torch.equal(_pixels(colourful), _pixels(plain))
    assert seen == {40}


@pytest.mark.parametrize(
    ("size", "res", "expected"),
    [((64, 128), 64, (32, 64)), ((36, 48), 96, (72, 96)), ((33, 50), 50, (33, 50))],
)
def test_resize_to_a_width_keeps_the_aspect_ratio(size, res, expected):
    image, label = _coded(*size, cell=8)
    out, out_label = train_transform(res, expected, 0, 0, scale=(1.0, 1.0))(image, label)
    assert out.shape[1:] == out_label.shape == expected
    assert (out_label != 255).all()


def test_validation_only_normalises():
    image, label = _coded()
    out, out_label = val_transform()(image, label)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(out, (image.float() / 255 - mean) / std)
    assert torch.equal(out_label, label.long())
    assert torch.equal(denormalise(out), image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"res": 0}, "res is 0"),
        ({"crop_res": 0}, "crop_res 0"),
        ({"crop_res": (3, 4, 5)}, "crop_res"),
        ({"jitter": -0.1}, "jitter is -0.1"),
        ({"jitter": 1.5}, "jitter is 1.5"),
        ({"rotate": -3}, "rotate is -3"),
        ({"scale": (2.0, 0.5)}, "scale is"),
        ({"scale": (0.0, 1.0)}, "scale is"),
    ],
)
def test_bad_settings(change, message):
    good = {"res": 64, "crop_res": 32, "jitter": 0.3, "rotate": 0.0, "scale": (0.5, 2.0)}
    with pytest.raises(ValueError, match=message) as error:
        train_transform(**{**good, **change})
    assert "\n" not in str(error.value)


# --- colour jitter on planes ----------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)])
@pytest.mark.parametrize("factors", [(1.3, 0.7, 1.3, 0.1), (0.7, 1.3, 0.7, -0.1)])
def test_colour_jitter_is_that_of_torchvision_on_pil_but_for_rounding(order, factors):
    torch.manual_seed(0)
    small = torch.randint(0, 256, (1, 3, 12, 20), dtype=torch.uint8).float()
    image = torch.nn.functional.interpolate(small, (96, 160), mode="bicubic").clamp(0, 255)
    image = tv_tensors.Image(image[0].to(torch.uint8))
    params = dict(zip((f"{name}_factor" for name in CHANGES), factors))
    mine = ColourJitter(0.3, 0.1).transform(image, {"fn_idx": torch.tensor(order), **params})
    published = F.to_pil_image(image)
    for i in order:
        published = getattr(F, f"adjust_{CHANGES[i]}")(published, factors[i])
    away = (mine.int() - F.pil_to_tensor(published).int()).abs()
    assert away.float().mean() < 2.5  # grey levels
    assert away.max() < 18  # PIL knows 256 hues: steps of 6 levels in a full colour, and cuts off


def test_colour_jitter_draws_what_torchvision_draws():
    image = _coded()[0]
    torch.manual_seed(3)
    mine = ColourJitter(0.3, 0.1).make_params([image])
    torch.manual_seed(3)
    theirs = v2.ColorJitter(0.3, 0.3, 0.3, 0.1).make_params([image])
    assert mine["fn_idx"].tolist() == theirs["fn_idx"].tolist()
    assert all(mine[f"{name}_factor"] == theirs[f"{name}_factor"] for name in CHANGES)


@pytest.mark.parametrize("turn", [0.0, 0.03, -0.1, 1 / 6, -1 / 6])
def test_hue_turns_round_the_circle(turn):
    angles = torch.arange(0, 360, 15)
    expected = [colorsys.hsv_to_rgb((a / 360 + turn) % 1, 0.8, 0.9) for a in angles.tolist()]
    start = torch.tensor([colorsys.hsv_to_rgb(a / 360, 0.8, 0.9) for a in angles.tolist()])
    planes = list((255 * start.T[:, None]).contiguous())  # three of 1,24
    hue(planes, turn)
    torch.testing.assert_close(torch.stack(planes)[:, 0].T / 255, torch.tensor(expected))


def test_hue_leaves_grey_alone():
    planes = [torch.arange(256.0)[None].clone() for _ in range(3)]
    hue(planes, 0.1)
    assert all(torch.equal(plane, torch.arange(256.0)[None]) for plane in planes)


def test_bytes_widened_on_the_device_are_what_the_transform_returns():
    settings = {"res": 192, "crop_res": 64, "jitter": 0.3, "rotate": 5}
    torch.manual_seed(1)
    wide = train_transform(**settings)(*_coded())
    torch.manual_seed(1)
    small = train_transform(**settings, as_bytes=True)(*_coded())
    assert [t.dtype for t in small] == [torch.uint8, torch.uint8]
    for bytes_, floats in ((small, wide), (wide, wide)):  # what is wide already passes
        image, label = to_network(bytes_[0][None], bytes_[1][None])
        torch.testing.assert_close(image[0], floats[0])
        assert torch.equal(label[0], floats[1])
