"""Recorded programs: replaying the calls on other blocks gives the network's own output."""

import networks
import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from programs import names, record, replay
from torch import Tensor
from traced_networks import (
    CHANNELS,
    NETWORKS,
    Net,
    changed_through_an_alias,
    read_then_changed,
    shifted,
)

from segblocks import execute_with_grid, no_blocks, to_blocks
from segblocks.dispatch import RECORDER
from segblocks.fast.network import not_replayable
from segblocks.fast.trace import Ref, recording
from segblocks.structure import find

TRUNKS = {
    "resnet18": (networks.resnet18_trunk, 64),
    "mobilenet": (networks.mobilenet_v2_trunk, 32),
    "efficientnet": (lambda: networks.efficientnet_trunk(no_blocks, gate_only=False), 32),
    "convnext": (networks.convnext_trunk, 32),
    **{f"random {i}": (lambda i=i: networks.random_network(i).eval(), 16) for i in range(12)},
}


def check_replay(net, block):
    """Recorded on one image and grid, replayed on others."""
    first, second = make_grid("one"), make_grid("mixed", seed=3)
    program = record(net, make_image(first, 3, block), first)
    assert program.obstacle is None
    for mask in (second, make_grid("all"), make_grid("none")):
        image = make_image(mask, 3, block, seed=5)
        with torch.no_grad():
            expected = execute_with_grid(net, image, mask)
        compare(replay(program, image, mask), expected)
    return program


def compare(mine, theirs):
    assert type(mine) is type(theirs)
    mine, theirs = find(mine, Tensor), find(theirs, Tensor)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs):
        assert distance(a, b) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_replaying_gives_the_networks_own_output(name):
    check_replay(Net(NETWORKS[name]).eval(), 8)


@pytest.mark.parametrize("name", TRUNKS)
def test_replaying_whole_networks(name):
    build, block = TRUNKS[name]
    program = check_replay(build(), block)
    assert len(program.nodes) > 5


def recorded(function):
    mask = make_grid("mixed")
    return record(Net(function).eval(), make_image(mask, 3, 8), mask)


# -- what is noted ---------------------------------------------------------------------------------


def test_values_describe_themselves():
    program = recorded(lambda net, x: {"out": net.strided(x).argmax(1, keepdim=True), "x": x})
    assert names(program) == ["conv2d", "conv2d", "argmax"]
    assert program.blocks == [8, 8, 4, 4]
    assert program.channels == [3, CHANNELS, CHANNELS, 1]
    assert program.layouts == ["NCHW"] * 4
    assert program.dtypes == [torch.float64] * 3 + [torch.int64]
    assert program.output == {"out": Ref(3), "x": Ref(1)}
    assert [program.is_output(value) for value in range(4)] == [False, True, False, True]
    assert program.users(1) == [program.nodes[1]]
    assert program.users(3) == []


def test_an_argument_that_is_read_twice_counts_twice():
    (node,) = recorded(lambda net, x: x + x).nodes[1:]
    assert (node.inputs, node.outputs) == ([1, 1], [2])


def test_a_list_of_blocks_is_seen():
    program = recorded(lambda net, x: torch.cat([x, *x.chunk(2, 1)], 1))
    assert names(program) == ["conv2d", "chunk", "cat"]
    chunk, cat = program.nodes[1:]
    assert chunk.outputs == [2, 3]
    assert cat.inputs == [1, 2, 3]


def test_an_in_place_function_makes_a_new_value():
    program = recorded(read_then_changed)
    conv, relu, add = program.nodes[1:]
    assert (conv.inputs, relu.inputs, relu.outputs) == ([1], [1], [3])
    assert add.inputs == [2, 3], "the argument is the changed one from then on"


def test_every_holder_of_the_memory_sees_the_change():
    relu, conv, add = recorded(changed_through_an_alias).nodes[1:]
    assert conv.inputs == relu.outputs
    assert add.inputs == [*relu.outputs, *conv.outputs]


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.drop(x),
        lambda net, x: F.pad(x, (0, 0, 0, 0)),
        lambda net, x: x.contiguous(),
        lambda net, x: x[:, :],
        lambda net, x: no_blocks(lambda t: t)(x),
    ],
    ids=["dropout", "pad", "contiguous", "slice", "no_blocks"],
)
def test_what_returns_its_argument(function):
    program = recorded(function)
    if names(program) == ["conv2d", "no_blocks"]:  # splits again, so the pixels are new
        assert program.output == Ref(2)
    else:
        assert names(program) == ["conv2d"]
        assert program.output == Ref(1)


def test_padding_belongs_to_the_call_that_takes_it_up():
    assert names(recorded(shifted)) == ["conv2d", "pad + conv2d"]


def test_dense_excursions_are_one_call():
    program = recorded(lambda net, x: no_blocks(lambda a, b: (a.sort(1)[0], b + a))(x, x.exp()))
    assert names(program) == ["conv2d", "exp", "no_blocks"]
    assert program.nodes[-1].inputs == [1, 2]
    assert program.nodes[-1].result == (Ref(3), Ref(4))


# -- what cannot be replayed -----------------------------------------------------------------------


def writes_into_a_view(net, x):
    x[:, :4].relu_()
    return net.conv(x)


def reads_a_view_of_what_changed(net, x):
    part = x[:, :4]
    x.relu_()
    return torch.cat((part, part), 1)


def changes_another_layout(net, x):
    x.permute(0, 2, 3, 1).relu_()
    return x


def splits_by_itself(net, x):
    return to_blocks(x.combine().sort(1)[0], x.grid)


def writes_out(net, x):
    torch.add(x, x, out=x)
    return x


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (writes_into_a_view, "conv2d"),
        (reads_a_view_of_what_changed, "cat"),
        (changes_another_layout, "the network's output"),
        (splits_by_itself, "blocks are combined"),
        (writes_out, "out="),
    ],
)
def test_what_cannot_be_replayed_is_named(function, reader):
    assert reader in recorded(function).obstacle


def test_a_captured_variable_that_is_deleted_is_named():
    def function(net, x):
        scale = 2
        y = no_blocks(lambda t: t * scale)(x)  # noqa: F821
        del scale
        return y

    assert "a variable that changes later" in recorded(function).obstacle


def test_dense_values_made_from_blocks_are_foreign():
    def gate(net, x):
        return x * no_blocks(lambda t: t.mean((2, 3), keepdim=True))(x).sigmoid()

    net = Net(gate).eval()
    mask = make_grid("mixed")
    image = make_image(mask, 3, 8)
    assert "'no_blocks' returns a dense tensor" in not_replayable(record(net, image, mask), net)
    other = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    net.function = lambda net, x: x * other
    assert "'mul'" in not_replayable(record(net, image, mask), net).replace("__mul__", "mul")
    net.function = lambda net, x: x * net.gain
    assert not_replayable(record(net, image, mask), net) is None
    net.function = lambda net, x: no_blocks(lambda t: t.mean((2, 3)))(x)
    assert "dense" in not_replayable(record(net, image, mask), net)


def test_recording_ends_with_its_context():
    net = Net(NETWORKS["plain"]).eval()
    mask = make_grid("mixed")
    blocks = to_blocks(make_image(mask, 3, 8), mask)
    with pytest.raises(RuntimeError, match="stop"), recording():
        raise RuntimeError("stop")
    assert RECORDER.get() is None
    with recording() as recorder:
        recorder.add(blocks)
    net(blocks)
    assert recorder.program.nodes == []
