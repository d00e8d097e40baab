"""The definition of block operations, spelt out with plain indexing: what the package equals.

A two-resolution tensor is two dense pictures. H is the full-resolution picture, whose low blocks
repeat the stored low pixels 2×2; L is the half-resolution picture, whose high blocks average the
stored high pixels 2×2. An operation on blocks is the dense operation on H, read at the high
blocks, and the dense operation on L, read at the low blocks; from what was read, both pictures are
rebuilt for the next operation. Nothing here is shared with the package.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


class SlowBlocks:
    """The two dense pictures `H` and `L` (any dtype) and the grid `mask` (N, Gh, Gw) bool.

    With `legacy`, bilinear resizing acts on each block alone, clamped at its own edge. While
    `whole` is False (after F.pad) the pictures do not line up with the grid, and the next operation
    continues from them as they are.
    """

    def __init__(self, H: Tensor, L: Tensor, mask: Tensor, legacy: bool = False):
        self.mask, self.legacy = mask, legacy
        self.whole = all(
            h == 2 * low and h % gaps == 0
            for h, low, gaps in zip(_sides(H, H, L), _sides(L, H, L), mask.shape[1:])
        )
        self.H, self.L = _read_and_rebuild(H, L, mask) if self.whole else (H, L)

    # -- reading ---------------------------------------------------------------------------------

    def stored(self) -> tuple[list[Tensor], list[Tensor]]:
        """The high blocks (..., b, b) and the low blocks (..., b/2, b/2) in raster order."""
        assert self.whole, "padded, but not taken up by an operation"
        H, L = _space_last(self.H, self.H, self.L), _space_last(self.L, self.H, self.L)
        high, low = [], []
        for n, gy, gx in _cells(self.mask):
            if self.mask[n, gy, gx]:
                high.append(H[_block(H, self.mask, n, gy, gx)])
            else:
                low.append(L[_block(L, self.mask, n, gy, gx)])
        return high, low

    def combine(self) -> Tensor:
        """H at the high blocks, bilinear ×2 of L at the low blocks (labels are repeated)."""
        assert self.whole, "padded, but not taken up by an operation"
        spatial = _spatial(self.H, self.L)
        H, L = _space_last(self.H, self.H, self.L), _space_last(self.L, self.H, self.L)
        out = torch.zeros_like(H)
        enlarged = _enlarge(L, 2)
        for n, gy, gx in _cells(self.mask):
            place = _block(out, self.mask, n, gy, gx)
            if self.mask[n, gy, gx]:
                out[place] = H[place]
            elif self.legacy:
                out[place] = _enlarge(L[_block(L, self.mask, n, gy, gx)][None], 2)[0]
            else:
                out[place] = enlarged[place]
        return out.movedim((-2, -1), spatial)

    # -- torch functions -------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__
        like = next(a for a in _flat((*args, *kwargs.values())) if isinstance(a, SlowBlocks))
        if name == "batch_norm" and _argument(args, kwargs, 5, "training"):
            return _joint_batch_norm(like, *args[1:], **kwargs)
        if name == "interpolate" and like.legacy and kwargs.get("mode") == "bilinear":
            return _resize_alone(like, kwargs)
        halved = dict(kwargs)
        if name == "interpolate" and kwargs.get("size") is not None:
            size = kwargs["size"]
            halved["size"] = size // 2 if isinstance(size, int) else [s // 2 for s in size]
        on_high = func(*_pick(args, "H"), **_pick(kwargs, "H"))
        on_low = func(*_pick(args, "L"), **_pick(halved, "L"))
        result = _pair_up(on_high, on_low, like)
        if kwargs.get("inplace") or _writes_in_place(name):
            args[0].H, args[0].L = result.H, result.L
        return result

    def __getattr__(self, name):
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        func = getattr(Tensor, name)
        return lambda *args, **kwargs: self.__torch_function__(func, (), (self, *args), kwargs)

    shape = property(lambda self: self.H.shape)
    ndim = property(lambda self: self.H.dim())
    dtype = property(lambda self: self.H.dtype)
    device = property(lambda self: self.H.device)

    def dim(self):
        return self.H.dim()

    def size(self, dim=None):
        return self.H.shape if dim is None else self.H.shape[dim]


def _operator(name):
    func = getattr(Tensor, name)
    return lambda self, *args: SlowBlocks.__torch_function__(func, (), (self, *args))


for _name in (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow neg abs "
    "lt le gt ge eq ne and or invert getitem"
).split():
    setattr(SlowBlocks, f"__{_name}__", _operator(f"__{_name}__"))


def slow_blocks(image: Tensor, mask: Tensor, legacy: bool = False) -> SlowBlocks:
    """Split: the image's pixels at high blocks, their 2×2 averages at low blocks."""
    return SlowBlocks(image, _average(image), mask, legacy)


def slow_execute(net, image: Tensor, mask: Tensor, legacy: bool = False):
    """Run `net` by the definition; block tensors in the result are combined."""
    return _combine_all(net(slow_blocks(image, mask, legacy)))


def slow_no_blocks(function):
    """Combine, `function`, split."""

    def dense(*args, **kwargs):
        found = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, SlowBlocks)]
        if not found:
            return function(*args, **kwargs)
        like = found[0]
        result = function(*_combine_all(args), **_combine_all(kwargs))
        is_picture = result.dim() == 4 and result.shape[2] >= 2 * like.mask.shape[1]
        return slow_blocks(result, like.mask, like.legacy) if is_picture else result

    return dense


# -- the pictures --------------------------------------------------------------------------------


def _spatial(H: Tensor, L: Tensor) -> list[int]:
    """The dimensions of height and width: those in which the two pictures differ."""
    return [d for d in range(H.dim()) if H.shape[d] != L.shape[d]]


def _sides(x: Tensor, H: Tensor, L: Tensor) -> list[int]:
    return [x.shape[d] for d in _spatial(H, L)]


def _space_last(x: Tensor, H: Tensor, L: Tensor) -> Tensor:
    return x.movedim(_spatial(H, L), (-2, -1))


def _cells(mask: Tensor):
    return product(*(range(size) for size in mask.shape))


def _block(picture: Tensor, mask: Tensor, n: int, gy: int, gx: int) -> tuple:
    """Where block (n, gy, gx) lies in a picture whose last two dimensions are space."""
    height, width = picture.shape[-2] // mask.shape[1], picture.shape[-1] // mask.shape[2]
    rows = slice(gy * height, (gy + 1) * height)
    columns = slice(gx * width, (gx + 1) * width)
    return n, ..., rows, columns


def _read_and_rebuild(H: Tensor, L: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    spatial = _spatial(H, L)
    read_high, read_low = _space_last(H, H, L), _space_last(L, H, L)
    high, low = torch.zeros_like(read_high), torch.zeros_like(read_low)
    for n, gy, gx in _cells(mask):
        in_high, in_low = _block(high, mask, n, gy, gx), _block(low, mask, n, gy, gx)
        if mask[n, gy, gx]:
            high[in_high] = read_high[in_high]
            low[in_low] = _average(read_high[in_high])
        else:
            high[in_high] = _repeat(read_low[in_low])
            low[in_low] = read_low[in_low]
    return high.movedim((-2, -1), spatial), low.movedim((-2, -1), spatial)


def _average(x: Tensor) -> Tensor:
    """Mean of each 2×2 pixels; labels have none, so one of them stands in."""
    corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return sum(corners) / 4 if x.is_floating_point() else corners[0]


def _repeat(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def _enlarge(x: Tensor, scale: float) -> Tensor:
    """Bilinear ×scale of the last two dimensions; labels are repeated."""
    if not x.is_floating_point():
        return _repeat(x)
    image = x.reshape(x.shape[0], -1, *x.shape[-2:])
    image = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
    return image.reshape(*x.shape[:-2], *image.shape[-2:])


# -- operations with a rule of their own -----------------------------------------------------------


def _joint_batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=True, momentum=0.1, eps=1e-5
):
    """Mean and variance over every stored pixel of both resolutions."""
    high, low = x.stored()
    values = torch.cat([block.flatten(1) for block in (*high, *low)], dim=1)  # C,P
    mean = values.mean(1)
    variance = ((values - mean[:, None]) ** 2).mean(1)
    if running_mean is not None:
        count = values.shape[1]
        unbiased = variance * count / (count - 1)
        with torch.no_grad():
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (unbiased - running_var)
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias

    def normalise(picture):
        centred = (picture - mean[:, None, None]) / torch.sqrt(variance + eps)[:, None, None]
        return centred * weight[:, None, None] + bias[:, None, None]

    return SlowBlocks(normalise(x.H), normalise(x.L), x.mask, x.legacy)


def _resize_alone(x: SlowBlocks, kwargs: dict) -> SlowBlocks:
    scale = kwargs.get("scale_factor")
    if scale is None:
        size = kwargs["size"]
        scale = (size if isinstance(size, int) else size[0]) / x.H.shape[2]
    side = int(x.H.shape[2] * scale), int(x.H.shape[3] * scale)
    H = x.H.new_zeros(*x.H.shape[:2], *side)
    L = x.L.new_zeros(*x.L.shape[:2], side[0] // 2, side[1] // 2)
    for n, gy, gx in _cells(x.mask):
        source, target = (x.H, H) if x.mask[n, gy, gx] else (x.L, L)
        block = source[_block(source, x.mask, n, gy, gx)]
        target[_block(target, x.mask, n, gy, gx)] = _enlarge(block[None], scale)[0]
    return SlowBlocks(H, L, x.mask, x.legacy)


# -- arguments and results -------------------------------------------------------------------------


def _writes_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name in ("__iadd__", "__isub__", "__imul__", "__itruediv__")
    return name.endswith("_")


def _argument(args: tuple, kwargs: dict, place: int, name: str):
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else False


def _flat(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _pick(value, picture: str):
    """The arguments with one picture (a copy) in the place of each block tensor."""
    if isinstance(value, SlowBlocks):
        return getattr(value, picture).clone()
    if isinstance(value, dict):
        return {key: _pick(item, picture) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_pick(item, picture) for item in value)
    return value


def _pair_up(on_high, on_low, like: SlowBlocks):
    if isinstance(on_high, Tensor):
        return SlowBlocks(on_high, on_low, like.mask, like.legacy)
    return type(on_high)([_pair_up(h, low, like) for h, low in zip(on_high, on_low)])


def _combine_all(value):
    if isinstance(value, SlowBlocks):
        return value.combine()
    if isinstance(value, dict):
        return {key: _combine_all(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_combine_all(item) for item in value)
    return value
