"""Weights that are streamed, resident, on disk or kept compute the same, bit for bit, and leave nothing behind."""

import gc
import weakref

import pytest
import torch
from torch import nn

from wan_core.offload.blocks import blocks_of, weights_of
from wan_core.offload.placement import place
from wan_core.offload.streaming import PlainCopies
from wan_core.offload.weights import Residency

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
    inventory = Residency.of(module).inventory()
    return [place(inventory, parameters=0), *(place(inventory, budget) for budget in (1500, 2500, 3500, 1e9))]


def test_blocks_are_the_repeated_parts(net):
    assert list(blocks_of(net)) == [*(f"blocks.{i}" for i in range(6)), "side.0", "side.1"]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 0, 3, 2, 2, 5, 1]])
def test_any_placement_and_any_order_compute_the_same(net, number, order):
    net.order = order
    x = torch.randn(3, 4)
    expected = net(x)
    with Residency.of(net).working(CPU, placements(net)[number]):
        for _ in range(3):
            assert torch.equal(net(x), expected)
    assert torch.equal(net(x), expected)


def test_nothing_stays_behind(net):
    before = snapshot(net)
    placement = place(Residency.of(net).inventory(), parameters=0)
    with Residency.of(net).working(CPU, placement):
        net(torch.randn(1, 4))
        assert any(weights_of(net)[name].data_ptr() != pointer for name, (pointer, _) in before.items())
    after = snapshot(net)
    assert all(torch.equal(value, after[name][1]) for name, (_, value) in before.items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks_of(net).values())
    with Residency.of(net).working(CPU, placement):
        pass
    assert {n: p for n, (p, _) in snapshot(net).items()} == {n: p for n, (p, _) in after.items()}, "rows are made once"


def test_an_exception_restores_everything(net):
    before = snapshot(net)
    placement = place(Residency.of(net).inventory(), parameters=0)
    net.blocks[3].norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError), Residency.of(net).working(CPU, placement, keep=True):
        net(torch.randn(1, 4))
    assert all(torch.equal(value, weights_of(net)[name]) for name, (_, value) in before.items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks_of(net).values())
    assert Residency.of(net).kept_bytes == 0


def test_each_block_is_copied_once_per_pass_once_the_order_is_known(net):
    inventory = Residency.of(net).inventory()
    placement = place(inventory, parameters=0)
    x = torch.randn(1, 4)
    with Residency.of(net).working(CPU, placement) as stream:
        net(x)
        counts = []
        for _ in range(4):
            before = stream.copied
            net(x)
            counts.append(stream.copied - before)
    assert counts[1:] == [placement.streamed_bytes] * 3


def test_a_given_order_is_right_from_the_first_pass(net):
    order = [f"blocks.{i}" for i in range(3)] + ["side.0", "side.1"] + [f"blocks.{i}" for i in range(3, 6)]
    placement = place(Residency.of(net).inventory(order), parameters=0)
    with Residency.of(net).working(CPU, placement) as stream:
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
    residency, copies = Residency.of(net), Counting()
    x = torch.randn(2, 4)
    expected = net(x)
    for _ in range(2):
        with residency.working(CPU, keep=True, copies=copies):
            assert torch.equal(net(x), expected)
            assert residency.evict() == 0, "weights at work stay"
    total = residency.inventory().bytes
    assert residency.kept_bytes == copies.brought == sum(w.nbytes for w in weights_of(net).values()) <= total
    assert 0 < residency.evict(100) < residency.kept_bytes + 500
    assert residency.evict() and residency.kept_bytes == 0
    with residency.working(CPU, copies=copies):
        assert torch.equal(net(x), expected)
    assert residency.kept_bytes == 0


def test_a_weight_that_was_changed_at_rest_is_brought_anew(net):
    residency, copies = Residency.of(net), Counting()
    with residency.working(CPU, keep=True, copies=copies):
        pass
    net.enter.weight.data = torch.zeros_like(net.enter.weight)
    with residency.working(CPU, keep=True, copies=copies):
        assert not net.enter.weight.any()


def test_a_weight_works_in_another_dtype_than_it_rests_in(net):
    residency = Residency.of(net)
    reference = Net().requires_grad_(False)
    reference.load_state_dict(net.state_dict())
    reference.to(torch.bfloat16)
    residency.work_dtypes = {name: torch.bfloat16 for name in weights_of(net)}
    x = torch.randn(2, 4).bfloat16()
    for placement in placements(net):
        with residency.working(CPU, placement):
            assert torch.equal(net(x), reference(x))
    assert net.enter.weight.dtype == torch.float32


def test_a_dropped_module_frees_its_weights_and_rows():
    net = Net().requires_grad_(False)
    with Residency.of(net).working(CPU, place(Residency.of(net).inventory(), parameters=0), keep=True):
        net(torch.randn(1, 4))
    seen = [weakref.ref(thing) for thing in (net, net.blocks[0].layer.weight, *Residency.of(net)._slabs.values())]
    del net
    gc.collect()
    assert not any(reference() for reference in seen)


def test_streamed_blocks_lie_between_resident_ones():
    net = Net(12).requires_grad_(False)
    inventory = Residency.of(net).inventory([f"blocks.{i}" for i in range(12)])
    size = next(iter(inventory.blocks.values())).bytes
    placement = place(inventory, inventory.outside.bytes + 10 * size)
    assert placement.streamed == ("blocks.1", "blocks.4", "blocks.7", "blocks.10")
    assert placement.device_bytes == inventory.outside.bytes + 10 * size


@pytest.mark.parametrize("parameters", [0, 100, 300, 10**6])
def test_at_most_so_many_parameters_stay(parameters):
    net = Net().requires_grad_(False)
    placement = place(Residency.of(net).inventory(), parameters=parameters)
    outside = sum(p.numel() for p in net.enter.parameters())
    kept = sum(t.numel() for path in placement.resident for t in weights_of(blocks_of(net)[path]).values())
    assert kept + outside <= max(parameters, outside)
    assert bool(placement.streamed) == (parameters < 10**6)
