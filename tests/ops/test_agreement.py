"""Every implementation computes what the reference computes: outputs and gradients, on awkward sizes and selections."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from engines import balanced, engines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops import head_attention
from mixhead.routing import Routing

ENGINES = engines("reference")
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}

# How a selection can be shaped: bool [B, N, H] from the sizes.
SELECTIONS = {
    "random": lambda *sizes: torch.rand(sizes) < 0.6,
    "everything": lambda *sizes: torch.ones(sizes, dtype=torch.bool),
    "nothing": lambda *sizes: torch.zeros(sizes, dtype=torch.bool),
    # One head takes all tokens, the next one takes 1 in 2, then 1 in 4, ...
    "skewed": lambda *sizes: torch.rand(sizes) < 0.5 ** torch.arange(sizes[-1]),
    "a head nobody selects": lambda *sizes: (torch.rand(sizes) < 0.6) & (torch.arange(sizes[-1]) != 1),
    "a token that selects nothing": lambda *sizes: (torch.rand(sizes) < 0.6) & (torch.arange(sizes[1]) != 0)[:, None],
    # All tokens use the first half of the heads (shared), the others none.
    "only shared heads": lambda *sizes: (torch.arange(sizes[-1]) < (sizes[-1] + 1) // 2).expand(sizes),
}


@dataclass
class Case:
    """Leaf tensors with gradient, and the selection. `outcome` is all that an implementation must agree on."""

    q_BHND: Tensor
    k_BKTD: Tensor
    v_BKTD: Tensor
    gates_BNH: Tensor
    selected_BNH: Tensor

    def fitted(self, impl):
        """This case with a selection that the engine can take."""
        if impl != "slots" or self.selected_BNH.numel() == 0:
            return self
        return replace(self, selected_BNH=balanced(self.selected_BNH, self.k_BKTD.shape[1]))

    def outcome(self, impl, attn_mask=None, cotangent_BHND=None, **kwargs):
        # Only selected heads have a gate, so only their gates have a gradient.
        gates_BNH = torch.where(self.selected_BNH, self.gates_BNH, 0.0)
        routing = Routing(gates_BNH, self.selected_BNH)
        with torch.set_grad_enabled(impl != "flex"):  # which has no gradient on the CPU
            out_BHND = head_attention(
                self.q_BHND, self.k_BKTD, self.v_BKTD, routing, attn_mask=attn_mask, impl=impl, **kwargs
            )
        assert out_BHND.shape == self.q_BHND.shape
        assert out_BHND.dtype == self.q_BHND.dtype
        assert (out_BHND.transpose(1, 2)[~self.selected_BNH] == 0).all()
        if impl == "flex":
            return {"output": out_BHND}
        inputs = {"q": self.q_BHND, "k": self.k_BKTD, "v": self.v_BKTD, "gates": self.gates_BNH}
        if attn_mask is not None and attn_mask.requires_grad:
            inputs["attn_mask"] = attn_mask
        if cotangent_BHND is None:
            generator = torch.Generator().manual_seed(1)
            cotangent_BHND = torch.randn(out_BHND.shape, generator=generator, dtype=out_BHND.dtype)
        gradients = torch.autograd.grad(out_BHND, list(inputs.values()), cotangent_BHND)
        return {"output": out_BHND.detach(), **dict(zip(inputs, gradients, strict=True))}


def make_case(queries, keys=None, *, batch=2, heads=4, kv_heads=4, head_dim=8, selection="random", dtype=torch.float32):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    keys = queries if keys is None else keys
    return Case(
        leaf(batch, heads, queries, head_dim),
        leaf(batch, kv_heads, keys, head_dim),
        leaf(batch, kv_heads, keys, head_dim),
        leaf(batch, queries, heads),
        SELECTIONS[selection](batch, queries, heads),
    )


def refuses(case, impl, attn_mask=None, **kwargs):
    """Whether an engine refuses a case, which it then does with a sentence. What all engines take is not asked here."""
    learned = attn_mask is not None and attn_mask.requires_grad
    narrow = impl in ("triton", "cpu") and case.q_BHND.dtype == torch.float64
    if not (narrow or (learned and impl in ("triton", "flex", "cpu"))):
        return False
    with pytest.raises(MixheadError, match=r"cannot take these arguments: .*\."):
        case.outcome(impl, attn_mask=attn_mask, **kwargs)
    return True


def assert_agrees(case, impl, **kwargs):
    case = case.fitted(impl)
    if refuses(case, impl, **kwargs):
        return
    expected, actual = case.outcome("reference", **kwargs), case.outcome(impl, **kwargs)
    if impl == "flex":
        expected = {"output": expected["output"]}
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, **TOLERANCE[tensor.dtype], msg=lambda m, name=name: f"{impl}, {name}: {m}"
        )


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_selections(impl, selection, kv_heads):
    assert_agrees(make_case(63, selection=selection, kv_heads=kv_heads), impl)
    assert_agrees(make_case(63, selection=selection, kv_heads=kv_heads), impl, causal=True)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
# The last query sees the last key, so N < T is decoding with a cache; with N > T the first queries see nothing.
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 197), (63, 63), (197, 63), (63, 197), (7, 1)])
def test_sizes(impl, queries, keys, causal, dtype):
    assert_agrees(make_case(queries, keys, kv_heads=2, dtype=dtype), impl, causal=causal)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_thousand_tokens(impl, causal):
    assert_agrees(make_case(1000, batch=1, kv_heads=2, selection="skewed"), impl, causal=causal)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("head_dim", [1, 3, 33, 64])
def test_head_dimensions(impl, head_dim):
    assert_agrees(make_case(17, head_dim=head_dim), impl)


MASK_SHAPES = [
    (),
    (9,),
    (1,),
    (7, 9),
    (7, 1),
    (4, 7, 9),
    (4, 1, 1),
    (2, 1, 1, 9),
    (2, 1, 7, 1),
    (1, 4, 7, 9),
    (2, 4, 7, 9),
]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_of_every_shape_and_kind(impl, shape, causal):
    case = make_case(7, 9, kv_heads=2)
    assert_agrees(case, impl, causal=causal, attn_mask=torch.rand(shape) < 0.6)
    assert_agrees(case, impl, causal=causal, attn_mask=torch.randn(shape))
    assert_agrees(case, impl, causal=causal, attn_mask=torch.randn(shape, requires_grad=True))  # a learned bias


# In slots the padded queries use heads like all others: test_slots.py asks about them.
@pytest.mark.parametrize("impl", engines("slots"))
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding(impl, kind, causal):
    """A left-padded sequence has the output and the gradients of the sequence without padding."""
    case = make_case(12, batch=1, kv_heads=2)
    real_T = torch.arange(12) >= 5
    lowest = -torch.inf if kind == "-inf" else torch.finfo(torch.float32).min
    mask = real_T if kind == "bool" else torch.zeros(12).masked_fill(~real_T, lowest)
    # The padded queries see nothing, or, under the lowest number, everything alike: they select nothing here.
    case.selected_BNH[:, :5] = False
    short = Case(
        *(t[:, :, 5:].detach().requires_grad_() for t in (case.q_BHND, case.k_BKTD, case.v_BKTD)),
        case.gates_BNH[:, 5:].detach().requires_grad_(),
        case.selected_BNH[:, 5:],
    )
    cotangent = torch.randn(1, 4, 12, 8)
    padded = case.outcome(impl, attn_mask=mask, causal=causal, cotangent_BHND=cotangent)
    expected = short.outcome("reference", causal=causal, cotangent_BHND=cotangent[:, :, 5:])
    for name, tensor in padded.items():
        tokens = 1 if name == "gates" else 2
        padding, real = tensor.split([5, 7], tokens)
        assert (padding == 0).all(), f"padding has no output and no gradient: {name}"
        torch.testing.assert_close(real, expected[name], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("impl", engines())
@pytest.mark.parametrize("additive", [False, True])
def test_a_query_that_may_attend_to_nothing_gives_zero(impl, additive):
    case = make_case(9, 7, selection="everything")
    sees_NT = torch.rand(9, 7) < 0.5
    sees_NT[[0, 4]] = False
    mask = torch.zeros(9, 7).masked_fill(~sees_NT, -torch.inf) if additive else sees_NT
    outcome = case.outcome(impl, attn_mask=mask)
    assert (outcome["output"][:, :, [0, 4]] == 0).all()
    assert impl == "flex" or (outcome["q"][:, :, [0, 4]] == 0).all()
    assert all(t.isfinite().all() for t in outcome.values())
    if impl != "reference":
        assert_agrees(case, impl, attn_mask=mask)
    # Under the causal rule too: nine queries, seven keys, so the first two queries come before every key.
    assert (case.outcome(impl, causal=True)["output"][:, :, :2] == 0).all()


@pytest.mark.parametrize("impl", engines())
def test_the_last_query_sees_the_last_key(impl):
    """Causal attention of the last queries alone equals the last rows of the whole: decoding in chunks."""
    case = make_case(20, selection="everything")
    whole = case.outcome(impl, causal=True)["output"]
    for start in (19, 13, 1):
        tail = Case(
            case.q_BHND[:, :, start:], case.k_BKTD, case.v_BKTD, case.gates_BNH[:, start:], case.selected_BNH[:, start:]
        )
        torch.testing.assert_close(tail.outcome(impl, causal=True)["output"], whole[:, :, start:])


@pytest.mark.parametrize("impl", engines())
@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 0, "keys": 5},
        {"queries": 5, "keys": 0},
        {"queries": 5, "batch": 0},
        {"queries": 600, "batch": 0},
        {"queries": 0, "keys": 0, "batch": 0},
    ],
    ids=str,
)
def test_sizes_of_zero(impl, sizes):
    for causal in (False, True):
        outcome = make_case(**sizes).fitted(impl).outcome(impl, causal=causal)
        assert all((t == 0).all() for t in outcome.values()), "attention to nothing is 0, and so is every gradient"


@pytest.mark.parametrize("impl", ENGINES)
def test_strides_do_not_matter(impl):
    case = make_case(13, 13, kv_heads=2).fitted(impl)
    strided = Case(
        q_BHND=case.q_BHND.detach().transpose(1, 2).contiguous().transpose(1, 2),  # as a projection makes it
        k_BKTD=case.k_BKTD.detach().repeat_interleave(2, -1)[..., ::2],
        v_BKTD=case.v_BKTD.detach().mT.contiguous().mT,
        gates_BNH=case.gates_BNH.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0),
        selected_BNH=case.selected_BNH.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    for tensor in (strided.q_BHND, strided.k_BKTD, strided.v_BKTD, strided.gates_BNH):
        assert not tensor.is_contiguous()
        tensor.requires_grad_()
    expected, actual = case.outcome("reference", causal=True), strided.outcome(impl, causal=True)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("impl", ENGINES)
def test_expanded_keys_and_gates(impl):
    case = make_case(13, batch=3)
    shared = make_case(13, batch=1)
    case.k_BKTD, case.v_BKTD = shared.k_BKTD.expand(3, -1, -1, -1), shared.v_BKTD.expand(3, -1, -1, -1)
    case.gates_BNH = torch.ones(1, 1, 1, requires_grad=True).expand(3, 13, 4)
    assert_agrees(case, impl)


@pytest.mark.parametrize("impl", engines("slots"))  # they run the stock kernel itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [63, 197])
def test_rounding_errors_are_those_of_the_stock_kernel(impl, dtype, causal, queries):
    case = make_case(queries, kv_heads=4, head_dim=16, dtype=torch.float64)
    q, k, v = (t.detach().to(dtype) for t in (case.q_BHND, case.k_BKTD, case.v_BKTD))
    gates_BNH = torch.where(case.selected_BNH, case.gates_BNH.detach().to(dtype), 0.0)

    def attend(impl, *qkv, gates):
        return head_attention(*qkv, Routing(gates, case.selected_BNH), causal=causal, impl=impl).double()

    if impl == "cpu" and dtype == torch.float16:
        with pytest.raises(MixheadError, match=r"computes in float32 and bfloat16, not in torch\.float16"):
            attend(impl, q, k, v, gates=gates_BNH)
        return
    exact = attend("reference", q.double(), k.double(), v.double(), gates=gates_BNH.double())
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal) * gates_BNH.mT.unsqueeze(-1)
    stock_error = (stock.double() - exact).norm()
    # The reference stores every step in the dtype that it is given, which the fused kernels do not.
    slack = 2.0 if impl == "reference" else 1.2
    if impl == "triton" and dtype == torch.bfloat16:
        slack = 3.0  # Triton's interpreter rounds to bfloat16 towards zero, which doubles every error.
    assert (attend(impl, q, k, v, gates=gates_BNH) - exact).norm() <= slack * stock_error
    # Gates of a router that computes in float32.
    assert (attend(impl, q, k, v, gates=gates_BNH.float()) - exact).norm() <= slack * stock_error


@pytest.mark.parametrize("impl", ENGINES)
@settings(max_examples=20)
@given(st.data())
def test_whatever_the_arguments(impl, data):
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    kv_heads = data.draw(st.integers(1, 3), "kv_heads")
    heads = kv_heads * data.draw(st.integers(1, 3), "query heads of a key-value head")
    batch, queries, keys = (data.draw(st.integers(1, top), name) for name, top in (("B", 3), ("N", 20), ("T", 20)))
    case = make_case(
        queries,
        keys,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=data.draw(st.integers(1, 9), "D"),
        selection=data.draw(st.sampled_from(sorted(SELECTIONS)), "selection"),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype"),
    )
    full = (batch, heads, queries, keys)
    keep = data.draw(st.lists(st.booleans(), min_size=4, max_size=4), "mask dimensions")
    mask_shape = [size if kept else 1 for size, kept in zip(full, keep, strict=True)]
    kind = data.draw(st.sampled_from(["none", "bool", "float", "float with -inf"]), "mask")
    mask = {
        "none": None,
        "bool": torch.rand(mask_shape) < 0.5,
        "float": torch.randn(mask_shape),
        "float with -inf": torch.zeros(mask_shape).masked_fill(torch.rand(mask_shape) < 0.5, -torch.inf),
    }[kind]
    causal = data.draw(st.booleans(), "causal")
    scale = data.draw(st.sampled_from([None, 0.0, 0.3, 2.0]), "scale")
    assert_agrees(case, impl, attn_mask=mask, causal=causal, scale=scale)


@pytest.mark.parametrize("impl", engines("triton", "cpu", "flex"))  # no float64, or no gradient on the CPU
@pytest.mark.parametrize(
    "kwargs", [{}, {"causal": True}, {"attn_mask": torch.rand(3, 4) < 0.7}], ids=["", "causal", "mask"]
)
def test_gradients_are_derivatives(impl, kwargs):
    case = make_case(3, 4, batch=1, heads=2, kv_heads=1, head_dim=2, dtype=torch.float64).fitted(impl)

    def attend(q, k, v, gates):
        routing = Routing(torch.where(case.selected_BNH, gates, 0.0), case.selected_BNH)
        return head_attention(q, k, v, routing, impl=impl, **kwargs)

    assert torch.autograd.gradcheck(attend, (case.q_BHND, case.k_BKTD, case.v_BKTD, case.gates_BNH))
