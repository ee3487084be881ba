"""FlexAttention: what the tests of all engines do not ask."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention

from mixhead.errors import MixheadError
from mixhead.ops import head_attention
from mixhead.ops.attention import flex
from mixhead.ops.rows import selected_first
from mixhead.routing import Routing


def make(queries=40, keys=40, *, heads=2, share=0.5):
    q = torch.randn(1, heads, queries, 16)
    k, v = (torch.randn(1, heads, keys, 16) for _ in range(2))
    selected = torch.rand(1, queries, heads) < share
    return q, k, v, Routing(selected * torch.rand(1, queries, heads), selected)


def test_as_a_user_calls_it(monkeypatch):
    """With the compiler that the other tests leave out."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    q, k, v, routing = make()
    expected = head_attention(q, k, v, routing, causal=True, impl="reference")
    torch.testing.assert_close(head_attention(q, k, v, routing, causal=True, impl="flex"), expected)


def blocks(selected_BHN, num_keys, **kwargs):
    return flex.blocks(selected_BHN, selected_first(selected_BHN), num_keys, kwargs.pop("causal", False), None)


def test_blocks_of_queries_that_select_nothing_are_skipped():
    selected_BHN = torch.zeros(1, 3, 512, dtype=torch.bool)
    selected_BHN[0, 0, 300:] = True  # 212 tokens: two blocks of 128
    selected_BHN[0, 1] = True
    mask = blocks(selected_BHN, 300)  # three blocks of keys
    assert mask.kv_num_blocks.tolist() == [[[3, 3, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]]


def test_under_the_causal_rule_a_block_sees_up_to_its_last_query():
    selected_BHN = torch.zeros(1, 2, 512, dtype=torch.bool)
    selected_BHN[0, 0, :100] = True
    selected_BHN[0, 0, 200:300] = True  # the first 128 rows end at position 227, the others at 299
    selected_BHN[0, 1, 511] = True
    assert blocks(selected_BHN, 512, causal=True).kv_num_blocks.tolist() == [[[2, 3, 0, 0], [4, 0, 0, 0]]]
    # With 300 keys the first 212 queries come before all of them.
    assert blocks(selected_BHN, 300, causal=True).kv_num_blocks.tolist() == [[[1, 1, 0, 0], [3, 0, 0, 0]]]


def test_nothing_is_read():
    """Reading a number out of a fake tensor raises; of a real one it would make a device wait for the host."""
    with FakeTensorMode():
        mask = blocks(torch.rand(1, 2, 300) < 0.5, 300, causal=True)
        assert mask.kv_num_blocks.shape == (1, 2, 3)


def test_what_is_refused():
    q, k, v, routing = make()
    with pytest.raises(MixheadError, match="no gradient on the CPU"):
        head_attention(q.requires_grad_(), k, v, routing, impl="flex")
    with torch.no_grad():  # leaves that could have a gradient, which nobody asks for
        assert not head_attention(q, k, v, routing, impl="flex").requires_grad
    bias = torch.zeros(40, 40, requires_grad=True)
    with pytest.raises(MixheadError, match="no gradient of the mask"):
        head_attention(q.detach(), k, v, routing, attn_mask=bias, impl="flex")
    assert "the queries are on meta" in flex.refusal(q.to("meta"), k, v, routing, None)
