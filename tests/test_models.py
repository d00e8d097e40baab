"""SwiftNet and its encoders against the published names, sizes, settings and definition."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import BACKBONES, build_model
from models.swiftnet import BNReluConv, SpatialPyramidPooling, SwiftNet, pyramid_pool
from utils.losses import build_loss

KEY_FILES = Path(__file__).parent / "data" / "published_checkpoint_keys"
PUBLISHED = ("resnet18", "resnet50", "efficientnet_lite1")
UNUSED = ("backbone.head.", "backbone.fc.")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build_on_meta(backbone: str, **options) -> SwiftNet:
    with torch.device("meta"):
        return build_model(backbone, 19, **options).eval()


def shake_norms(module: nn.Module) -> None:
    """Random affine and running statistics, so that no normalisation is close to the identity."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)


class RandomFeatures(nn.Module):
    """Stands for an encoder: learns nothing, returns features of the right sizes."""

    channels = (6, 10, 14, 18)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        sizes = [[math.ceil(s / stride) for s in image.shape[-2:]] for stride in (4, 8, 16, 32)]
        return tuple(
            torch.randn(len(image), c, *size, generator=generator, dtype=image.dtype)
            for c, size in zip(self.channels, sizes)
        )


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(backbone):
    published = json.loads((KEY_FILES / f"{backbone}.json").read_text())
    expected = {
        name.removeprefix("net."): tuple(shape)
        for name, shape in published.items()
        if name.startswith("net.") and not name.removeprefix("net.").startswith(UNUSED)
    }
    own = {name: tuple(value.shape) for name, value in build_on_meta(backbone).state_dict().items()}
    assert len(expected) > 150
    assert own == expected


def test_number_of_parameters_of_resnet18():
    assert sum(p.numel() for p in build_on_meta("resnet18").parameters()) == 11_797_071


@pytest.mark.parametrize(
    ("backbone", "gmacs"),
    [("resnet18", 103.57), ("resnet50", 204.63), ("efficientnet_lite1", 24.09)],
)
def test_gmacs_at_2048x1024(backbone, gmacs):
    net = build_on_meta(backbone)
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 1024, 2048, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 70), (32, 32)])
def test_logits_come_at_stride_4(backbone, height, width):
    net = build_on_meta(backbone)
    features = net.backbone(torch.empty(2, 3, height, width, device="meta"))
    for x, channels, stride in zip(features, net.backbone.channels, (4, 8, 16, 32), strict=True):
        assert x.shape == (2, channels, math.ceil(height / stride), math.ceil(width / stride))
    logits = net(torch.empty(2, 3, height, width, device="meta"))
    assert logits.shape == (2, 19, math.ceil(height / 4), math.ceil(width / 4))


def test_resnet_features_are_taken_after_the_final_relu():
    for x in build_model("resnet18", 2).eval().backbone(torch.randn(1, 3, 64, 64)):
        assert (x >= 0).all()
        assert (x == 0).any()


@pytest.mark.parametrize(
    ("backbone", "momentum", "eps"), [("resnet50", 0.05, 1e-5), ("efficientnet_lite0", 0.01, 1e-3)]
)
def test_batch_norm_settings(backbone, momentum, eps):
    net = build_on_meta(backbone)
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        if name == "backbone.bn1":
            expected = (0.1, 1e-5)
        elif name.startswith("backbone."):
            expected = (momentum, eps)
        elif name.startswith("spp."):
            expected = (0.005, 1e-5)
        else:
            expected = (0.05, 1e-5)
        assert (norm.momentum, norm.eps) == expected, name
    assert sum(name.startswith("spp.") for name in norms) == 5


def test_decoder_starts_with_he_initialisation():
    net = build_model("resnet18", 19)
    layers = [m for m in net.modules() if isinstance(m, BNReluConv)]
    assert len(layers) == 5 + 3 * 2 + 1
    for layer in layers:
        weight = layer.conv.weight
        expected = math.sqrt(2 / weight[0].numel())
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    assert (net.logits.conv.bias == 0).all()


@pytest.mark.parametrize("num_features", [None, 24, 50])
def test_number_of_decoder_features(num_features):
    net = build_on_meta("efficientnet_lite0", num_features=num_features)
    features = 48 if num_features is None else num_features
    assert net.logits.conv.in_channels == features
    assert net.spp.spp["spp_fuse"].conv.in_channels == features + 3 * (features // 3)
    assert net(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 19, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (12, 16), (8, 8), (5, 13), (1, 3), (9, 2)])
@pytest.mark.parametrize("rows", [8, 4, 2])
def test_pyramid_pool_is_adaptive_average_pooling(height, width, rows):
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    columns = max(1, round(width / height * rows))
    pooled = pyramid_pool(x, rows)
    expected = F.adaptive_avg_pool2d(x, (rows, columns))
    assert pooled.shape == expected.shape
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-14)
    weight = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((pooled * weight).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-14)


def reference_decoder(state: dict[str, Tensor], features: list[Tensor]) -> Tensor:
    """The decoder as the publication words it, written out on the state dict."""

    def layer(name: str, x: Tensor) -> Tensor:
        norm = {k: state[f"{name}.norm.{k}"][:, None, None] for k in ("weight", "bias")}
        mean, var = (state[f"{name}.norm.running_{k}"][:, None, None] for k in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt() * norm["weight"] + norm["bias"]
        weight = state[f"{name}.conv.weight"]
        bias = state.get(f"{name}.conv.bias")
        return F.conv2d(x.clamp(min=0), weight, bias, padding=weight.shape[-1] // 2)

    def resize(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    *skips, x = features
    x = layer("spp.spp.spp_bn", x)
    levels = [x]
    for i, rows in enumerate((8, 4, 2)):
        grid = (rows, max(1, round(x.shape[-1] / x.shape[-2] * rows)))
        levels.append(resize(layer(f"spp.spp.spp{i}", F.adaptive_avg_pool2d(x, grid)), x))
    x = layer("spp.spp.spp_fuse", torch.cat(levels, 1))
    for i, skip in enumerate(reversed(skips)):
        x = resize(x, skip) + layer(f"upsample.{i}.bottleneck", skip)
        x = layer(f"upsample.{i}.blend_conv", x)
    return layer("logits", x)


@pytest.mark.parametrize("size", [(256, 512), (160, 96), (97, 131)])
def test_decoder_follows_its_definition(size):
    net = SwiftNet(RandomFeatures(), num_classes=5, features=16).double().eval()
    shake_norms(net)
    image = torch.zeros(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference_decoder(net.state_dict(), list(net.backbone(image)))
        logits = net(image)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_a_copy_of_the_model_uses_its_own_weights():
    spp = SpatialPyramidPooling(8, 6).eval()
    x = torch.randn(1, 8, 16, 16)
    before = spp(x)
    twin = copy.deepcopy(spp)
    nn.init.zeros_(twin.spp["spp_fuse"].conv.weight)
    assert (twin(x) == 0).all()
    assert torch.equal(spp(x), before)


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_channels_last_gives_the_same(backbone):
    net = build_model(backbone, 4).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = net(image)
        net.to(memory_format=torch.channels_last)
        logits = net(image.contiguous(memory_format=torch.channels_last))
    assert logits.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


def test_fx_graph_gives_the_same_at_any_size():
    net = build_model("resnet18", 4).eval()
    graph = torch.fx.symbolic_trace(net)
    for size in [(64, 64), (64, 160)]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(graph(image), net(image))


def test_dynamo_traces_without_a_break():
    net = build_model("efficientnet_lite0", 4).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        traced = torch.compile(net, backend="eager", fullgraph=True)(image)
        torch.testing.assert_close(traced, net(image))


def test_every_parameter_learns():
    net = build_model("resnet18", 4)
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(256, 512), (192, 320)])  # pooling bins that tile, that overlap
def test_a_training_step_repeats_bit_for_bit_on_cuda(monkeypatch, size):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    net = build_model("resnet18", 5).cuda()
    image = torch.randn(2, 3, *size, device="cuda")
    target = torch.randint(5, (2, *size), device="cuda")
    criterion = build_loss("bootstrap_ce")
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            net.zero_grad()
            criterion(net(image), target)[0].backward()
            runs.append([p.grad.clone() for p in net.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unknown_backbone_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg'.*resnet18.*efficientnet_lite1"):
        build_model("vgg", 19)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_classes": 0}, "at least one class"), ({"num_features": 2}, "at least 3")],
)
def test_impossible_sizes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build_model("resnet18", **{"num_classes": 19, **options})
