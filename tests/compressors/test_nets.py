import math

import pytest
import torch

from lococo.compressors.nets import FACTS, HeadSettings, Joined, Joining, Net


def nets_of(depth=1):
    settings = HeadSettings([0], num_key_value_heads=2, head_dim=4, width=6, kernel_size=3, depth=depth)
    nets = [Net(settings, outputs) for outputs in (1, 2)]
    for parameter in torch.nn.ModuleList(nets).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return nets


def seen():
    return torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, FACTS)


@pytest.mark.parametrize("depth", [0, 1, 2])
@torch.no_grad()
def test_nets_joined_say_what_each_says_alone(depth):
    nets, (content, facts) = nets_of(depth), seen()
    for net, said in zip(nets, Joined.of(nets)(content, facts), strict=True):
        hidden = torch.nn.functional.silu(content * math.sqrt(4) @ net.content + net.facts(facts) + net.head)
        for convolution in net.convolutions:
            mixed = torch.stack([convolution(row.transpose(1, 2)).transpose(1, 2) for row in hidden])
            hidden = torch.nn.functional.silu(hidden + mixed)
        torch.testing.assert_close(said, net.out(hidden).permute(3, 0, 1, 2))


def changed_in_place(net):
    with torch.no_grad():
        net.out.weight.add_(1)


def loaded(net):
    net.load_state_dict({name: weight + 1 for name, weight in net.state_dict().items()})


def replaced(net):
    net.out.weight = torch.nn.Parameter(net.out.weight + 1)


@pytest.mark.parametrize("change", [changed_in_place, loaded, replaced])
def test_nets_are_joined_anew_once_they_have_changed(change):
    nets, joining = nets_of(), Joining()
    with torch.no_grad():
        first = joining(nets)
        assert joining(nets) is first
        change(nets[0])
        again = joining(nets)
    assert not torch.equal(again.outward, first.outward)
    assert torch.equal(again.outward, Joined.of(nets).outward)


def test_gradients_flow_through_joined_nets():
    nets, joining = nets_of(), Joining()
    with torch.no_grad():
        joining(nets)
    sum(said.sum() for said in joining(nets)(*seen())).backward()
    assert all(weight.grad is not None for net in nets for weight in net.parameters())
