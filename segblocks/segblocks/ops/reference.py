"""The block operations in plain PyTorch, for any device: what the CUDA kernels must equal.

Each function has the name and signature of the registered operation. `N, Gh, Gw` is the grid; a
pixel buffer is (P, C) with the high blocks first. All run without autograd: every operation comes
with its explicit gradient, which is a transpose but for the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import ring


def build_slots(grid: Tensor) -> tuple[Tensor, Tensor]:
    flat = grid.flatten()
    low = ~flat
    slot = torch.where(flat, flat.cumsum(0) - 1, -low.cumsum(0))
    cells = torch.argsort(low.to(torch.uint8), stable=True)
    return slot.view(grid.shape).int(), cells.int()


def select_budget(scores: Tensor, count: int) -> Tensor:
    flat = scores.flatten(1).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # NaN below -inf: sort twice, both stable, the second key being "is a number".
    order = flat.argsort(dim=1, descending=True, stable=True)
    number = (~scores.flatten(1).isnan()).gather(1, order).to(torch.uint8)
    order = order.gather(1, number.argsort(dim=1, descending=True, stable=True))
    grid = torch.zeros_like(flat, dtype=torch.bool)
    return grid.scatter_(1, order[:, :count], True).view(scores.shape)


def split(image: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int) -> Tensor:
    half = F.avg_pool2d(_accumulate(image), 2).to(image.dtype)
    high = _cut(image, slot, cells[:n_high], block)
    low = _cut(half, slot, cells[n_high:], block // 2)
    return torch.cat((high, low))


def split_backward(
    grad: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, channels_last: bool
) -> Tensor:
    high, low = _blocks(grad, cells, n_high, block, block)
    low = (_accumulate(low) / 4).to(grad.dtype).repeat_interleave(2, 1).repeat_interleave(2, 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _join(high, low, slot, cells, n_high, block).contiguous(memory_format=layout)


def combine(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    legacy: bool,
    channels_last: bool = True,
) -> Tensor:
    if not pixels.is_floating_point():  # labels: nothing lies between two classes
        high, low = _blocks(pixels, cells, n_high, block, block)
        low = low.repeat_interleave(2, 1).repeat_interleave(2, 2)
    else:
        high, low = _resize(pixels, slot, cells, n_high, block, (1, 2), legacy)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _join(high, low, slot, cells, n_high, block).contiguous(memory_format=layout)


def combine_backward(
    grad: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, legacy: bool
) -> Tensor:
    high = _cut(grad, slot, cells[:n_high], block).view(n_high, block, block, grad.shape[1])
    low = _cut(grad, slot, cells[n_high:], block).view(-1, block, block, grad.shape[1])
    return _resize_backward(high, low, slot, cells, n_high, block, (1, 2), legacy)


def blockpad(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
    fill: float,
) -> Tensor:
    sides = (left, right, top, bottom)
    padded = []
    halves = zip(_blocks(pixels, cells, n_high, block, block), (1, 2))
    for stored, shrink in halves:
        n, side = stored.shape[0], block // shrink
        out = stored.new_empty((n, side + top + bottom, side + left + right, stored.shape[-1]))
        inner_out, inner_in = _interior(side, sides)
        out[inner_out] = stored[inner_in]
        rows, inside, y, x = ring(slot, cells, n_high, block, sides, shrink, replicate)
        if rows.numel():
            halo = pixels[rows] if shrink == 1 else _mean_of_four(pixels[rows])
            out[:, y, x] = halo.masked_fill_(~inside[..., None], fill)
        padded.append(out.flatten(0, 2))
    return torch.cat(padded)


def blockpad_backward(
    grad: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
) -> Tensor:
    sides = (left, right, top, bottom)
    n_low, channels = cells.shape[0] - n_high, grad.shape[1]
    out = _accumulate(grad).new_zeros((n_high * block**2 + n_low * (block // 2) ** 2, channels))
    high, low = _blocks(grad, cells, n_high, block, block, top + bottom, left + right)
    stored_high, stored_low = _blocks(out, cells, n_high, block, block)
    for padded, stored, shrink in ((high, stored_high, 1), (low, stored_low, 2)):
        inner_out, inner_in = _interior(block // shrink, sides)
        stored[inner_in] += padded[inner_out]
        rows, inside, y, x = ring(slot, cells, n_high, block, sides, shrink, replicate)
        if not rows.numel():
            continue
        halo = _accumulate(padded[:, y, x]).masked_fill(~inside[..., None], 0)
        if shrink == 2:
            halo = (halo / 4).unsqueeze(2).expand(-1, -1, 4, -1)
        out.index_add_(0, rows.flatten(), halo.reshape(-1, channels))
    return out.to(grad.dtype)


def turn_weight(weight: Tensor) -> Tensor:
    turned = weight.flip((2, 3)).permute(1, 2, 3, 0)
    return turned.clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def max_pool(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
    fill: float,
    kernel: list[int],
    stride: int,
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    sides = (left, right, top, bottom)
    if any(sides):
        pixels = blockpad(pixels, slot, cells, n_high, block, *sides, replicate, fill)
    outs, taps = [], []
    for part in _blocks(pixels, cells, n_high, block, block, top + bottom, left + right):
        if not part.shape[0]:
            continue
        window = (kernel, (stride, stride), (0, 0), dilation)
        out, index = torch.ops.aten.max_pool2d_with_indices(part.permute(0, 3, 1, 2), *window)
        y, x = _window_corners(out, stride)
        row, column = index // part.shape[2] - y, index % part.shape[2] - x
        tap = row // dilation[0] * kernel[1] + column // dilation[1]
        for rows, image in ((outs, out), (taps, tap.to(torch.uint8))):
            rows.append(image.permute(0, 2, 3, 1).reshape(-1, pixels.shape[1]))
    return torch.cat(outs), torch.cat(taps)


def max_pool_backward(
    grad: Tensor,
    taps: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
    kernel: list[int],
    stride: int,
    dilation: list[int],
) -> Tensor:
    sides, side, padded = (left, right, top, bottom), block // stride, []
    parts = zip(_blocks(grad, cells, n_high, side, side), _blocks(taps, cells, n_high, side, side))
    for own, (out, tap) in zip((block, block // 2), parts):
        if not out.shape[0]:
            continue
        out, tap = out.permute(0, 3, 1, 2), tap.permute(0, 3, 1, 2).long()
        height, width = own + top + bottom, own + left + right
        y, x = _window_corners(out, stride)
        row, column = y + tap // kernel[1] * dilation[0], x + tap % kernel[1] * dilation[1]
        size = (*out.shape[:2], height, width)
        last = torch.channels_last
        shape = torch.empty(size, dtype=out.dtype, device=out.device, memory_format=last)
        window = (kernel, (stride, stride), (0, 0), dilation, False, row * width + column)
        image = torch.ops.aten.max_pool2d_with_indices_backward(out, shape, *window)
        padded.append(image.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]))
    pixels = torch.cat(padded)
    if not any(sides):
        return pixels
    return blockpad_backward(pixels, slot, cells, n_high, block, *sides, replicate)


def _window_corners(out: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Row (h, 1) and column (1, w) of the first pixel of the window of each output (N, C, h, w)."""
    y, x = (torch.arange(n, device=out.device) * stride for n in out.shape[2:])
    return y[:, None], x[None]


def upsample(
    pixels: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, scale: int, legacy: bool
) -> Tensor:
    resized = _resize(pixels, slot, cells, n_high, block, (scale, scale), legacy)
    return torch.cat([x.flatten(0, 2) for x in resized])


def upsample_backward(
    grad: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, scale: int, legacy: bool
) -> Tensor:
    high, low = _blocks(grad, cells, n_high, block * scale, block * scale)
    return _resize_backward(high, low, slot, cells, n_high, block, (scale, scale), legacy)


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    large = enlarged(logits, target)
    losses = cross_entropy_of(large, target, ignore_index)
    return losses, large.logsumexp(1).masked_fill_(target == ignore_index, 0)


def pixel_cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, log_sums: Tensor, ignore_index: int
) -> Tensor:
    large, ignored = enlarged(logits, target), (target == ignore_index)[:, None]
    grad = grad[:, None].masked_fill(ignored, 0)
    part = (large - log_sums[:, None]).masked_fill_(ignored, -torch.inf).exp_().mul_(grad)
    part.scatter_add_(1, target[:, None].masked_fill(ignored, 0), -grad)
    if part.shape != logits.shape:
        part = torch.ops.aten.upsample_bilinear2d_backward(
            part, part.shape[-2:], logits.shape, False
        )
    return torch.empty_like(logits).copy_(part)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def enlarged(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (N, C, h, w) at the size of the target (N, H, W), half precision widened."""
    size = target.shape[-2:]
    logits = logits.to(loss_dtype(logits.dtype))
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def cross_entropy_of(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of every pixel (N, H, W), at the size of the logits."""
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")


def _accumulate(x: Tensor) -> Tensor:
    """Sums of half-precision values are taken in float32, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mean_of_four(x: Tensor) -> Tensor:  # ..., 4, C -> ..., C
    return _accumulate(x).mean(dim=-2).to(x.dtype)


def _cut(image: Tensor, slot: Tensor, cells: Tensor, side: int) -> Tensor:
    """The pixels of the given cells, block by block: (len(cells)*side*side, C)."""
    n, gh, gw = slot.shape
    c = image.shape[1]
    tiles = image.reshape(n, c, gh, side, gw, side).permute(0, 2, 4, 3, 5, 1)  # N,Gh,Gw,s,s,C
    index = cells.long()
    y, x = index // gw % gh, index % gw
    return tiles[index // (gh * gw), y, x].reshape(-1, c)


def _join(
    high: Tensor, low: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int
) -> Tensor:
    """Put full-size blocks (n, block, block, C) at their cells: (N, C, H, W)."""
    n, gh, gw = slot.shape
    blocks = torch.cat((high, low))
    order = torch.where(slot >= 0, slot, n_high - 1 - slot).long()
    image = blocks[order]  # N,Gh,Gw,b,b,C
    return image.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, gh * block, gw * block)


def _blocks(
    pixels: Tensor,
    cells: Tensor,
    n_high: int,
    height: int,
    width: int,
    more_height: int = 0,
    more_width: int = 0,
) -> tuple[Tensor, Tensor]:
    """Views (n_high, h, w, C) and (n_low, h', w', C) of a buffer, `more` pixels added to each."""
    n_low, c = cells.shape[0] - n_high, pixels.shape[1]
    split_at = n_high * (height + more_height) * (width + more_width)
    high = pixels[:split_at].view(n_high, height + more_height, width + more_width, c)
    low = pixels[split_at:].view(n_low, height // 2 + more_height, width // 2 + more_width, c)
    return high, low


def _interior(side: int, sides: tuple[int, int, int, int]) -> tuple[tuple, tuple]:
    """Slices of the padded block and of the stored block that hold the same pixels."""
    left, right, top, bottom = sides

    def spans(before: int, after: int) -> tuple[slice, slice]:
        start, stop = max(0, -before), side - max(0, -after)
        return slice(start + before, max(start, stop) + before), slice(start, max(start, stop))

    (y_out, y_in), (x_out, x_in) = spans(top, bottom), spans(left, right)
    return (slice(None), y_out, x_out), (slice(None), y_in, x_in)


def _resize(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    scales: tuple[int, int],
    legacy: bool,
) -> list[Tensor]:
    """High and low blocks, (n, side, side, C) each, enlarged bilinearly by their own scale.

    Neighbours count through a halo of one pixel, which is cropped away again; `legacy` has none.
    """
    halo = 0 if legacy else 1
    if halo:
        pixels = blockpad(pixels, slot, cells, n_high, block, 1, 1, 1, 1, True, 0.0)
    resized = []
    blocks = _blocks(pixels, cells, n_high, block, block, 2 * halo, 2 * halo)
    for x, scale in zip(blocks, scales):
        n, side, _, c = x.shape
        if n and scale > 1:
            x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=scale, mode="bilinear")
            x = x.permute(0, 2, 3, 1)
        else:
            x = x.new_empty((n, side * scale, side * scale, c)) if n == 0 else x
        edge = halo * scale
        resized.append(x[:, edge : x.shape[1] - edge, edge : x.shape[2] - edge])
    return resized


def _resize_backward(
    high: Tensor,
    low: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    scales: tuple[int, int],
    legacy: bool,
) -> Tensor:
    halo = 0 if legacy else 1
    grads = []
    for grad, scale in zip((high, low), scales):
        n, side, _, c = grad.shape
        side = side // scale + 2 * halo
        edge = halo * scale
        whole = F.pad(grad, (0, 0, edge, edge, edge, edge)).permute(0, 3, 1, 2)
        if n == 0:
            whole = grad.new_empty((0, c, side, side))
        elif scale > 1:
            whole = torch.ops.aten.upsample_bilinear2d_backward(
                whole, list(whole.shape[-2:]), [n, c, side, side], False, scale, scale
            )
        grads.append(whole.permute(0, 2, 3, 1).reshape(-1, c))
    grad = torch.cat(grads)
    if legacy:
        return grad
    return blockpad_backward(grad, slot, cells, n_high, block, 1, 1, 1, 1, True)
