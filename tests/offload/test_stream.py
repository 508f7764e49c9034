"""Weights that are streamed, resident, on disk or kept compute the same, bit for bit, and leave nothing behind."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from wan_core.offload.blocks import blocks_of, weights_of
from wan_core.offload.streaming import PlainCopies, place
from wan_core.offload.weights import WeightProvider

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(self, x):
        return x + self.gain * torch.tanh(self.layer(self.norm(x)))


class Net(nn.Module):
    """Blocks that run in a given order, some of them more than once."""

    def __init__(self, count: int = 6, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))
        self.side = nn.Sequential(*(nn.Linear(width, width) for _ in range(2)))
        self.order = list(range(count))

    def forward(self, x):
        x = self.enter(x)
        for index in self.order:
            x = self.blocks[index](x)
            if index == 2:
                x = self.side[1](self.side[0](x))
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def snapshot(module):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in weights_of(module).items()}


def placements(module):
    inventory = WeightProvider.of(module).inventory()
    return [place(inventory, parameters=0), *(place(inventory, budget) for budget in (1500, 2500, 3500, 1e9))]


def test_blocks_are_the_repeated_parts(net):
    assert list(blocks_of(net)) == [*(f"blocks.{i}" for i in range(6)), "side.0", "side.1"]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 0, 3, 2, 2, 5, 1]])
def test_any_placement_and_any_order_compute_the_same(net, number, order):
    net.order = order
    x = torch.randn(3, 4)
    expected = net(x)
    with WeightProvider.of(net).working(CPU, placements(net)[number]):
        for _ in range(3):
            assert torch.equal(net(x), expected)
    assert torch.equal(net(x), expected)


def test_nothing_stays_behind(net):
    before = snapshot(net)
    placement = place(WeightProvider.of(net).inventory(), parameters=0)
    with WeightProvider.of(net).working(CPU, placement):
        net(torch.randn(1, 4))
        assert any(weights_of(net)[name].data_ptr() != pointer for name, (pointer, _) in before.items())
    after = snapshot(net)
    assert all(torch.equal(value, after[name][1]) for name, (_, value) in before.items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks_of(net).values())
    with WeightProvider.of(net).working(CPU, placement):
        pass
    assert {n: p for n, (p, _) in snapshot(net).items()} == {n: p for n, (p, _) in after.items()}, "rows are made once"


def test_an_exception_restores_everything(net):
    before = snapshot(net)
    placement = place(WeightProvider.of(net).inventory(), parameters=0)
    net.blocks[3].norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError), WeightProvider.of(net).working(CPU, placement, keep=True):
        net(torch.randn(1, 4))
    assert all(torch.equal(value, weights_of(net)[name]) for name, (_, value) in before.items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks_of(net).values())
    assert WeightProvider.of(net).cached_bytes == 0


def test_each_block_is_copied_once_per_pass_once_the_order_is_known(net):
    inventory = WeightProvider.of(net).inventory()
    placement = place(inventory, parameters=0)
    x = torch.randn(1, 4)
    with WeightProvider.of(net).working(CPU, placement) as stream:
        net(x)
        counts = []
        for _ in range(4):
            before = stream.copied
            net(x)
            counts.append(stream.copied - before)
    assert counts[1:] == [placement.streamed_bytes] * 3


def test_a_given_order_is_right_from_the_first_pass(net):
    order = [f"blocks.{i}" for i in range(3)] + ["side.0", "side.1"] + [f"blocks.{i}" for i in range(3, 6)]
    placement = place(WeightProvider.of(net).inventory(order), parameters=0)
    with WeightProvider.of(net).working(CPU, placement) as stream:
        for _ in range(3):
            net(torch.randn(1, 4))
    first = placement.inventory.blocks["blocks.0"].bytes
    assert stream.copied == 3 * placement.streamed_bytes + first, "and the first block once more, for a next pass"


class Counting(PlainCopies):
    """Copies whole weights too, as to another device."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.brought = 0

    def whole(self, weight, dtype):
        self.brought += weight.nbytes
        return weight.to(dtype, copy=True)


def test_kept_copies_are_used_again_and_dropped_on_demand(net):
    provider, copies = WeightProvider.of(net), Counting()
    x = torch.randn(2, 4)
    expected = net(x)
    for _ in range(2):
        with provider.working(CPU, keep=True, copies=copies):
            assert torch.equal(net(x), expected)
            assert provider.evict() == 0, "weights at work stay"
    total = provider.inventory().bytes
    assert provider.cached_bytes == copies.brought == sum(w.nbytes for w in weights_of(net).values()) <= total
    assert 0 < provider.evict(100) < provider.cached_bytes + 500
    assert provider.evict() and provider.cached_bytes == 0
    with provider.working(CPU, copies=copies):
        assert torch.equal(net(x), expected)
    assert provider.cached_bytes == 0


def zeros(net):
    return {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}


def set_parameter(net):
    net.enter.weight = nn.Parameter(torch.zeros_like(net.enter.weight), requires_grad=False)


CHANGES = {
    "the provider replaces it": lambda net: WeightProvider.of(net).replace("enter.weight", torch.zeros(8, 4)),
    "a script replaces the parameter": set_parameter,
    "a script loads a state dict": lambda net: net.load_state_dict(zeros(net)),
    "a script assigns a state dict": lambda net: net.load_state_dict(zeros(net), assign=True),
    "a script casts the module": lambda net: net.to(torch.float64).load_state_dict(zeros(net)),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_were_changed_between_uses_are_copied_again(net, change, streamed):
    provider, copies = WeightProvider.of(net), Counting()
    placement = place(provider.inventory(), parameters=0) if streamed else None
    with provider.working(CPU, placement, keep=True, copies=copies):
        pass
    CHANGES[change](net.requires_grad_(False))
    x = torch.randn(2, 4, dtype=net.enter.weight.dtype)
    expected = net.requires_grad_(False)(x)
    with provider.working(CPU, placement, keep=True, copies=copies):
        assert not net.enter.weight.any() and torch.equal(net(x), expected)


def test_a_use_inside_of_a_use_changes_nothing(net):
    provider, x = WeightProvider.of(net), torch.randn(2, 4)
    expected, placement = net(x), place(provider.inventory(), parameters=0)
    for outer, inner in ((None, placement), (placement, None), (placement, placement)):
        with provider.working(CPU, outer) as stream:
            with provider.working(CPU, inner) as same:
                assert same is stream and torch.equal(net(x), expected)
            assert torch.equal(net(x), expected)


def test_a_fold_and_a_change_in_turn_hold_under_every_placement(net):
    provider, x = WeightProvider.of(net), torch.randn(2, 4)
    before, plain = snapshot(net), net(x)
    for placement in (None, *placements(net)):
        strength = [2.0]

        def change(base, strength=strength):
            return base * strength[0]

        with (
            provider.folded("enter.weight", change) as fold,
            provider.changed_while_running("blocks.1", {"blocks.1.gain": change}),
            provider.working(CPU, placement),
        ):
            double = net(x)
            strength[0] = 1.0
            fold()
            assert torch.equal(net(x), plain) and not torch.equal(double, plain)
        assert torch.equal(net(x), plain)
    assert all(torch.equal(value, before[name][1]) for name, (_, value) in snapshot(net).items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks_of(net).values())


def test_a_copied_or_pickled_module_has_a_provider_of_its_own(net):
    provider = WeightProvider.of(net)
    provider.work_dtypes["enter.weight"] = torch.bfloat16
    copied, loaded = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    assert WeightProvider.of(copied) is copied.weight_provider is not provider
    assert copied.weight_provider.work_dtypes == provider.work_dtypes
    assert WeightProvider.of(loaded) is not provider
    for module in (copied, loaded):
        with WeightProvider.of(module).working(CPU):
            pass


def test_a_weight_works_in_another_dtype_than_it_rests_in(net):
    provider = WeightProvider.of(net)
    reference = Net().requires_grad_(False)
    reference.load_state_dict(net.state_dict())
    reference.to(torch.bfloat16)
    provider.work_dtypes = {name: torch.bfloat16 for name in weights_of(net)}
    x = torch.randn(2, 4).bfloat16()
    for placement in placements(net):
        with provider.working(CPU, placement):
            assert torch.equal(net(x), reference(x))
    assert net.enter.weight.dtype == torch.float32


def test_a_dropped_module_frees_its_weights_and_rows():
    net = Net().requires_grad_(False)
    with WeightProvider.of(net).working(CPU, place(WeightProvider.of(net).inventory(), parameters=0), keep=True):
        net(torch.randn(1, 4))
    seen = [weakref.ref(thing) for thing in (net, net.blocks[0].layer.weight, *WeightProvider.of(net).flat_buffers)]
    del net
    gc.collect()
    assert not any(reference() for reference in seen)


def test_streamed_blocks_lie_between_resident_ones():
    net = Net(12).requires_grad_(False)
    inventory = WeightProvider.of(net).inventory([f"blocks.{i}" for i in range(12)])
    size = next(iter(inventory.blocks.values())).bytes
    placement = place(inventory, inventory.outside.bytes + 10 * size)
    assert placement.streamed == ("blocks.1", "blocks.4", "blocks.7", "blocks.10")
    assert placement.device_bytes == inventory.outside.bytes + 10 * size


@pytest.mark.parametrize("parameters", [0, 100, 300, 10**6])
def test_at_most_so_many_parameters_stay(parameters):
    net = Net().requires_grad_(False)
    placement = place(WeightProvider.of(net).inventory(), parameters=parameters)
    outside = sum(p.numel() for p in net.enter.parameters())
    kept = sum(t.numel() for path in placement.resident for t in weights_of(blocks_of(net)[path]).values())
    assert kept + outside <= max(parameters, outside)
    assert bool(placement.streamed) == (parameters < 10**6)
