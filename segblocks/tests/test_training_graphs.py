"""Training from CUDA graphs gives what training without them gives."""

import copy
import functools
import gc
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segblocks import SegBlocksModel, TrainingGraphs, build_policy
from segblocks.capturing import without_collection
from segblocks.graphs import Parts

BLOCK = 32
POLICIES = {
    "disabled": {},
    "random": {},
    "reinforce": {"quantize_percentage": 1 / 8},
    "reinforce entropy": {"quantize_percentage": 1 / 8, "entropy_weight": 0.1, "recolour": True},
    "reinforce budgets": {"budgets": (0.2, 0.8), "quantize_percentage": 1 / 4},
}


@dataclass
class Box:
    x: torch.Tensor


class Net(nn.Module):
    """What a graph has to repeat: batch statistics, a residual, random numbers, two outputs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(16, 5, 1)
        self.unused = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = torch.relu_(self.norm(self.stem(x)))
        x = x + self.dropout(self.body(x))
        return {"logits": self.head(x), "features": [x]}


def make(graphs, policy="random", net=None, device="cuda", **options):
    torch.manual_seed(0)
    options = {"percent_target": 0.4, **options}
    model = SegBlocksModel(net or Net(), build_policy(policy, BLOCK, **options))
    model.train_from_graphs(TrainingGraphs() if graphs else None)
    return model.to(device, memory_format=torch.channels_last).train()


def images(seed, n=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 3 * BLOCK, 4 * BLOCK, generator=generator).cuda()


def loss_of(model, image):
    """-> the loss, the number of high blocks."""
    result = model(image)
    return objective_of(model, result), result.n_high


def judged(model, image):
    """The same by a forward pass that computes the loss, given labels."""
    labels = (image[:, 0] > 0).long()
    loss, count = model(image, objective=judge_of(model), targets=(labels,))
    return loss, int(count)


@functools.cache
def judge_of(model):
    def judge(result, labels):
        assert not torch.is_autocast_enabled(labels.device.type)
        loss = objective_of(model, result)
        at = F.interpolate(labels[:, None].float(), scale_factor=0.5)
        loss = loss + (result.logits["logits"].float() * at).mean()
        return loss, result.grid.sum()

    return judge


def objective_of(model, result):
    logits, features = result.logits["logits"], result.logits["features"][0]
    loss = logits.square().mean() + (logits.float().logsumexp(1) - features.float().mean(1)).mean()
    if model.policy.learns:
        loss_map = logits.detach().float().square().mean(1)
        loss_map = F.interpolate(loss_map[None], scale_factor=2)[0]
        loss = loss + model.policy.loss(result, loss_map, torch.ones_like(loss_map).bool())[0]
    return loss


@torch.no_grad()
def _evaluated(model, seed, budget):
    torch.manual_seed(seed)
    return model(images(seed), budget=None if model.is_dense else budget)


def _leaves(result):
    return [result.logits["logits"], *result.logits["features"]]


def train(model, steps=8, amp=None, accumulate=1, loss_of=loss_of):
    """-> losses, numbers of high blocks."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(1)
    losses, counts = [], []
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(accumulate):
            with torch.autocast("cuda", amp, enabled=amp is not None):
                loss, count = loss_of(model, images(step * accumulate + i))
            loss.backward()
            losses.append(loss.detach())
            counts.append(count)
        optimizer.step()
    return torch.stack(losses), counts


def captured(model):
    return model.graphs.captured(model.net)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


class TestOnCuda:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("loss_of", [loss_of, judged], ids=["network", "objective"])
    def test_weights_and_losses_are_those_without_graphs(self, policy, amp, loss_of, deterministic):
        options = POLICIES[policy]
        policy = policy.split()[0]
        models = [make(graphs, policy, **options) for graphs in (False, True)]
        (plain, counts), (graphed, same_counts) = (train(m, 7, amp, 1, loss_of) for m in models)
        assert counts == same_counts
        assert captured(models[1]) >= 1
        # Libraries may add up in another order in a graph: from 1e-9 on, differences grow by steps.
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(graphed, plain, **close)
        other = models[1].state_dict()
        for name, value in models[0].state_dict().items():
            torch.testing.assert_close(other[name], value, **close, msg=name)

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("hook", [False, True], ids=["", "hook"])
    def test_the_short_way_back(self, policy, hook, deterministic):
        model, kept, seen = make(True, policy.split()[0], **POLICIES[policy]), [], []
        judged(model, images(0))[0].backward()  # sets libraries up
        handle = model.net.body.weight.register_hook(seen.append) if hook else None
        for backward in (torch.Tensor.backward, TrainingGraphs.backward):
            model.zero_grad()
            for i in range(2):
                torch.manual_seed(7)
                loss, _ = judged(model, images(i))
                backward(loss)
            kept.append([p.grad for p in model.parameters() if p.grad is not None])
        assert captured(model) >= 1
        assert len(seen) == (4 if hook else 0)
        for one, two in zip(*kept, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError, match="second time"):
            TrainingGraphs.backward(loss)
        if handle:
            handle.remove()

    def test_exploration_is_no_part_of_a_graph(self, deterministic):
        grads = []
        for graphs in (False, True):
            model = make(graphs, "reinforce", quantize_percentage=1.0)
            grads.append([])
            for exploration in (1.0, 0.5, 0.25, 0.0):
                model.policy.exploration = exploration
                model.zero_grad()
                torch.manual_seed(2)
                judged(model, images(0))[0].backward()
                grads[-1] += [p.grad.clone() for p in model.policy.parameters()]
        assert captured(model) == 1
        for one, two in zip(*grads):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)

    def test_released_graphs_are_captured_anew(self, deterministic):
        models = [make(graphs) for graphs in (False, True)]
        for seed in range(3):
            losses = []
            for model in models:
                torch.manual_seed(seed)
                losses.append(loss_of(model, images(seed))[0])
                losses[-1].backward()
            torch.testing.assert_close(losses[1], losses[0])
            assert captured(models[1]) == min(seed, 1)
            if seed == 1:
                waiting = loss_of(models[1], images(seed))[0]
                models[1].graphs.release()
                assert captured(models[1]) == 0
                with pytest.raises(RuntimeError, match="capture"):
                    waiting.backward()
        for one, two in zip(*(m.net.parameters() for m in models)):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-6)

    def test_random_numbers_go_on(self):
        model = make(True, net=Net(dropout=0.5))
        torch.manual_seed(3)
        image = images(0)
        with torch.no_grad():
            for p in model.net.parameters():
                p.add_(0.1)
        outs = [loss_of(model, image)[0] for _ in range(4)]
        assert captured(model) == 1
        assert len({round(o.item(), 6) for o in outs}) == 4
        torch.manual_seed(3)
        model.train_from_graphs(None)
        first = loss_of(model, image)[0]
        torch.testing.assert_close(first, outs[0])

    def test_gradients_accumulate(self, deterministic):
        models = [make(graphs) for graphs in (False, True)]
        (plain, _), (graphed, _) = (train(m, 4, accumulate=3) for m in models)
        assert captured(models[1]) == 1
        torch.testing.assert_close(graphed, plain, rtol=1e-6, atol=1e-7)

    def test_gradients_kept_over_two_backward_passes_are_sums(self):
        model = make(True)
        image = images(0)
        loss_of(model, image)[0].backward()  # sets libraries up
        torch.manual_seed(5)
        model.zero_grad()
        loss_of(model, image)[0].backward()
        once = [p.grad.clone() for p in model.net.parameters() if p.grad is not None]
        torch.manual_seed(5)
        loss_of(model, image)[0].backward()
        twice = [p.grad for p in model.net.parameters() if p.grad is not None]
        for one, two in zip(once, twice):
            torch.testing.assert_close(two, 2 * one)

    def test_a_second_forward_pass_before_the_backward_pass(self, deterministic):
        grads = []
        for graphs in (False, True):
            model = make(graphs)
            loss_of(model, images(9))[0].backward()
            model.zero_grad()
            torch.manual_seed(5)
            first, second = (loss_of(model, images(i))[0] for i in range(2))
            (first + 2 * second).backward()
            grads.append([p.grad for p in model.net.parameters() if p.grad is not None])
        for one, two in zip(*grads):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)

    def test_a_dropped_forward_pass_does_not_block_the_next(self):
        model = make(True)
        for i in range(4):
            loss_of(model, images(i))
        assert captured(model) == 1
        loss_of(model, images(5))[0].backward()
        assert model.net.body.weight.grad.abs().sum() > 0

    def test_a_second_backward_pass_is_refused(self):
        model = make(True)
        loss_of(model, images(0))
        loss = loss_of(model, images(1))[0]
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"second time.*call the model again"):
            loss.backward()

    def test_frozen_and_moved_weights_are_captured_anew(self):
        model = make(True)
        train(model, 3)
        assert captured(model) == 1
        model.net.stem.requires_grad_(False)
        train(model, 3)
        assert captured(model) == 2
        before = model.net.stem.weight.clone()
        model.net.norm.eval()
        mean = model.net.norm.running_mean.clone()
        train(model, 3)
        assert captured(model) == 3
        assert torch.equal(model.net.norm.running_mean, mean)
        assert torch.equal(model.net.stem.weight, before)
        model.net.head.weight.data = model.net.head.weight.data.clone()
        moved = model.net.head.weight.clone()
        train(model, 3)
        assert captured(model) == 4
        assert not torch.equal(model.net.head.weight, moved)

    def test_hooks_run_each_time(self):
        model, calls = make(True), []
        model.net.body.register_forward_hook(lambda *_: calls.append(1))
        train(model, 4)
        assert len(calls) == 4
        assert captured(model) == 0

    def test_what_cannot_be_captured_trains_without(self):
        class Reads(Net):
            def forward(self, x):
                out = super().forward(x)
                self.total = float(out["logits"].mean(1).pixels.sum())
                return out

        torch.manual_seed(0)
        model = make(True, net=Reads())
        with pytest.warns(UserWarning, match="Reads trains without CUDA graphs: .*captur"):
            train(model, 4)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses, _ = train(model, 3)
        assert losses.isfinite().all()

    @pytest.mark.parametrize("why", ["dataclass", "parameter"])
    def test_what_a_graph_would_leave_out_is_not_captured(self, why):
        class Hides(Net):
            def __init__(self):
                super().__init__()
                self.hidden = [self.head.weight]

            def forward(self, x):
                if why == "parameter":
                    return {"logits": F.conv2d(x, self.hidden[0][:, :3]), "features": [x]}
                return Box(self.head(self.body(self.stem(x))))

        torch.manual_seed(0)
        net = Hides().cuda()
        graphs, image = TrainingGraphs(), images(0)

        def step():
            net.zero_grad()
            out = graphs(net, net, (image,))
            (out.x if why == "dataclass" else out["logits"]).square().mean().backward()
            return net.head.weight.grad.clone()

        first = step()
        with pytest.warns(UserWarning, match="returns a Box" if why == "dataclass" else "reaches"):
            found = [step() for _ in range(3)]
        for gradient in found:
            torch.testing.assert_close(gradient, first)

    def test_the_backward_pass_is_not_under_autocast(self):
        class Island(Net):
            def forward(self, x):
                with torch.autocast("cuda", enabled=False):
                    y = torch.einsum("nchw,oc->nohw", x.float(), self.mix)
                return self.head(self.stem(y))

            def __init__(self):
                super().__init__()
                self.mix = nn.Parameter(torch.randn(3, 3))

        torch.manual_seed(0)
        net, graphs, image = Island().cuda(), TrainingGraphs(), images(0)
        gradients = []
        for _ in range(3):
            net.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                out = graphs(net, net, (image,))
            out.float().square().mean().backward()
            gradients.append(net.mix.grad.clone())
        assert graphs.captured(net) == 1
        torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-5, atol=1e-7)

    def test_a_parameter_outside_the_network_keeps_its_gradient(self):
        """As of a loss that learns its own weights: it trains without graphs, and says so."""
        torch.manual_seed(0)
        net, graphs, weight = Net().cuda(), TrainingGraphs(), nn.Parameter(torch.ones(()).cuda())

        def function(image):
            return net(image)["logits"].mean() * weight

        def step(i):
            weight.grad = None
            graphs(net, function, (images(i),)).backward()
            assert weight.grad is not None

        step(0)
        with pytest.warns(UserWarning, match="reaches a parameter otherwise"):
            step(1)
        step(2)
        assert graphs.captured(net) == 0

    def test_more_settings_than_are_kept(self):
        net, graphs = Net().cuda(), TrainingGraphs(most=2)

        def step(count):
            graphs(net, net, (images(0, count),))["logits"].mean().backward()

        for count in (1, 1, 2):
            step(count)
        assert graphs.captured(net) == 2
        with pytest.warns(UserWarning, match="more than 2 settings occur"):
            step(3)
        step(4)
        assert graphs.captured(net) == 0

    def test_a_failed_capture_is_told_to_who_draws_from_the_same_generator(self):
        told, net = [], Net().cuda()
        graphs = TrainingGraphs(most=2, failed=lambda: told.append(graphs.captured(net)))

        def step(count, function=net):
            graphs(net, function, (images(0, count),))["logits"].mean().backward()

        def reads(x):
            assert x.sum().isfinite()
            return net(x)

        for count in (1, 1, 2):
            step(count)
        assert not told
        with pytest.warns(UserWarning, match="more than 2 settings occur"):
            step(3)
        assert not told, "nothing was captured"
        graphs = TrainingGraphs(failed=lambda: told.append(graphs.captured(net)))
        step(1)
        step(1)
        assert graphs.captured(net) == 1
        graphs(net, reads, (images(0),), "reads")
        assert told == [0]

    def test_graphs_that_nobody_uses_do_not_end_a_capture(self):
        """The garbage collector would destroy them in the middle of it."""
        graph, (net, graphs) = torch.cuda.CUDAGraph(), (Net().cuda(), TrainingGraphs())
        with torch.cuda.graph(graph):
            torch.zeros(8, device="cuda").add_(1)
        unused = [[graph]]
        unused[0].append(unused[0])
        del graph
        found = []

        def function(image):
            if torch.cuda.is_current_stream_capturing():
                unused.clear()
                found.append([[i] for i in range(10_000)])  # which sets the collector off
            return net(image)

        for i in range(3):
            graphs(net, function, (images(i),))["logits"].mean().backward()
        assert len(found) == 1
        assert graphs.captured(net) == 1

    @pytest.mark.parametrize("policy", POLICIES)
    def test_passes_without_gradient(self, policy):
        """Captured when a setting occurs again, and what they are without graphs."""
        kind, options = policy.split()[0], POLICIES[policy]
        models = [make(graphs, kind, **options).eval() for graphs in (False, True)]
        for seed in range(6):
            plain, graphed = (_evaluated(m, seed, 5) for m in models)
            assert torch.equal(plain.grid, graphed.grid)
            for one, two in zip(_leaves(plain), _leaves(graphed)):
                torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
                assert not two.requires_grad
        assert captured(models[1]) >= 1

    @pytest.mark.parametrize("frozen", [False, True])
    def test_passes_without_gradient_follow_weights(self, frozen):
        model = make(True).eval()
        model.train_from_graphs(TrainingGraphs(frozen=frozen))
        first = [_leaves(_evaluated(model, 0, 5))[0] for _ in range(4)]
        assert captured(model) == 1
        assert all(torch.equal(first[0], x) for x in first)  # and none is another's memory
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        changed = _leaves(_evaluated(model, 0, 5))[0]
        model.train_from_graphs(None)
        torch.testing.assert_close(changed, _leaves(_evaluated(model, 0, 5))[0])
        assert not torch.allclose(changed, first[0])

    def test_passes_without_gradient_between_others(self):
        """They neither wait for a backward pass nor disturb it."""
        models = [make(graphs) for graphs in (False, True)]
        for step in range(3):
            for model in models:
                torch.manual_seed(step)
                loss = loss_of(model, images(1))[0]
                model.eval()
                for _ in range(3):
                    _evaluated(model, 2, 5)
                model.train()
                loss.backward()
        assert captured(models[1]) == 2
        for one, two in zip(*(m.net.parameters() for m in models)):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-6)

    def test_without_gradient_more_settings_than_are_kept_run_as_written(self):
        model = make(True).eval()
        model.train_from_graphs(TrainingGraphs(most=2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for count in (1, 2, 3, 4) * 3:
                _evaluated(model, 0, count)
        assert captured(model) == 2

    def test_settings_share_memory(self):
        """Ten counts of high blocks need hardly more than the largest."""
        model = make(True, net=Net())
        image = torch.randn(8, 3, 8 * BLOCK, 8 * BLOCK, device="cuda")
        used = []
        for count in (0, 64, *range(1, 60, 5)):
            model(image, budget=count).logits["logits"].mean().backward()
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            used.append(torch.cuda.memory_reserved())
        assert captured(model) >= 12
        # 2 MiB is the smallest piece that PyTorch asks CUDA for.
        assert used[-1] <= used[1] + 32 * 2**20


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_meanwhile(enabled):
    if not enabled:
        gc.disable()
    try:
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_on_the_cpu_everything_is_as_without():
    models = [make(graphs, device="cpu") for graphs in (False, True)]
    image = torch.randn(2, 3, 3 * BLOCK, 4 * BLOCK)
    losses = []
    for model in models:
        torch.manual_seed(1)
        losses += [loss_of(model, image)[0]]
        losses[-1].backward()
    assert torch.equal(*losses)
    assert captured(models[1]) == 0


def _on_cpu(policy):
    """-> a model without graphs, images that are no whole number of blocks."""
    model = make(False, policy.split()[0], device="cpu", **POLICIES[policy])
    return model, torch.randn(2, 3, 3 * BLOCK - 5, 4 * BLOCK)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_objective_is_computed_from_what_the_model_returns(policy):
    model, image = _on_cpu(policy)
    twice = []
    for how in ("returned", "given"):
        torch.manual_seed(4)
        model.zero_grad()
        if how == "returned":
            result = model(image)
            found = {"loss": result.logits["logits"].square().mean() + result.share}
        else:
            found = model(
                image, objective=lambda r: {"loss": r.logits["logits"].square().mean() + r.share}
            )
        found["loss"].backward()
        twice.append([found["loss"].detach(), *(p.grad for p in model.net.head.parameters())])
    for one, two in zip(*twice):
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_decision_made_before_is_the_same_one(policy):
    model, image = _on_cpu(policy)
    results = []
    for given in ({}, {"objective": lambda output: output}):
        for before in (False, True):
            torch.manual_seed(4)
            decision = model.decide(image) if before else None
            with torch.no_grad():
                results.append(model(image, decision=decision, **given))
    one, *others = results
    for other in others:
        assert torch.equal(other.grid, one.grid)
        assert other.n_high == one.n_high
        torch.testing.assert_close(other.logits, one.logits)


def test_the_short_way_back_without_graphs():
    weight = torch.ones(3, requires_grad=True)
    TrainingGraphs.backward((weight * torch.arange(3)).sum())
    assert weight.grad.tolist() == [0, 1, 2]


def test_parts_notice_what_changes():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    parts = Parts(net)
    state = parts.state()
    assert state == parts.state() is not None

    def changed():
        nonlocal state
        before, state = state, parts.state()
        return before != state

    net[1][1] = nn.GELU()
    assert changed()
    net[1].append(nn.Conv2d(4, 4, 1))
    assert changed()
    assert not changed()
    net[1][0].eval()
    assert changed()
    net[0].weight.requires_grad_(False)
    assert changed()
    net[1][0].running_mean = torch.ones(4)
    assert changed()
    net.double()
    assert changed()
    net[0].register_forward_hook(lambda *_: None)
    assert parts.state() is None


def test_frozen_parts_are_looked_at_once():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    parts = Parts(net, frozen=True)
    state = parts.state()
    net[1].eval()
    net[0].register_forward_hook(lambda *_: None)
    assert parts.state() == state
    hooked = Parts(net, frozen=True)
    assert hooked.state() is None
    net[0]._forward_hooks.clear()
    assert hooked.state() is not None


def test_graphs_do_not_keep_a_network_alive():
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    parts, there = Parts(net), weakref.ref(net)
    parts.state()
    kept = parts.everything()
    del net
    gc.collect()
    assert there() is None
    assert kept


def test_a_copy_has_graphs_of_its_own():
    model = make(True, device="cpu")
    other = copy.deepcopy(model)
    assert isinstance(other.graphs, TrainingGraphs)
    assert other.graphs is not model.graphs
