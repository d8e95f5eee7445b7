"""``attention_to_linears_``: the same outputs and gradients as torch's own attention, then quantized."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import learnsched as ls
from learnsched.attention import ProjectedAttention

CONSTRUCTION = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "other widths": {"kdim": 6, "vdim": 5},
    "one width apart, no bias": {"vdim": 5, "bias": False},
}
HEADS, BATCH, QUERIES, KEYS = 2, 3, 4, 5


def attention(**options):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, HEADS, **options).double()
    for name, parameter in model.named_parameters():
        if "bias" in name:  # which are zeros at first
            nn.init.normal_(parameter)
    return model


def inputs(model, batched):
    widths = (8, model.kdim, model.vdim)
    lengths = (QUERIES, KEYS, KEYS)
    made = [torch.randn(BATCH, n, w).double() for n, w in zip(lengths, widths, strict=True)]
    if not batched:
        return [x[0] for x in made]
    return made if model.batch_first else [x.transpose(0, 1) for x in made]


def masks(batched):
    several = torch.rand(BATCH * HEADS if batched else HEADS, QUERIES, KEYS) < 0.3
    several[..., 0] = False  # where all keys are masked there is nothing to compare
    one = torch.randn(QUERIES, KEYS).double()
    padding = torch.zeros((BATCH, KEYS) if batched else (KEYS,), dtype=torch.bool)
    padding[..., 3:] = True
    return itertools.product((None, several, one), (None, padding, -2.0 * padding.double()))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_outputs_weights_and_gradients_are_those_of_torch(options, batched):
    model = attention(**options)
    own = ls.attention_to_linears_(copy.deepcopy(model))
    given = inputs(model, batched)
    for (mask, padding), need, average in itertools.product(
        masks(batched), (True, False), (True, False)
    ):
        arguments = {
            "key_padding_mask": padding, "attn_mask": mask,
            "need_weights": need, "average_attn_weights": average,
        }  # fmt: skip
        expected, found = model(*given, **arguments), own(*given, **arguments)
        torch.testing.assert_close(found, expected)
    model(*given)[0].square().sum().backward()
    own(*given)[0].square().sum().backward()
    packed = model.in_proj_weight
    weights = [model.q_proj_weight, model.k_proj_weight, model.v_proj_weight]
    wanted = [w.grad for w in weights] if packed is None else packed.grad.chunk(3)
    for projection, gradient in zip((own.q_proj, own.k_proj, own.v_proj), wanted, strict=True):
        torch.testing.assert_close(projection.weight.grad, gradient)
    torch.testing.assert_close(own.out_proj.weight.grad, model.out_proj.weight.grad)


def test_a_causal_hint_without_its_mask_is_refused_and_ignored_with_it():
    model = ls.attention_to_linears_(attention(batch_first=True))
    x = torch.randn(2, 4, 8).double()
    with pytest.raises(ValueError, match="give attn_mask, too"):
        model(x, x, x, is_causal=True)
    mask = nn.Transformer.generate_square_subsequent_mask(4).double()
    hinted = model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert torch.equal(hinted, model(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("need", [True, False])
def test_dropout_falls_on_the_weights_in_training_alone(need):
    model = ls.attention_to_linears_(attention(batch_first=True, dropout=0.5))
    x = torch.randn(2, 64, 8).double()
    expected = model.eval()(x, x, x, need_weights=need)[0]
    assert torch.equal(expected, model(x, x, x, need_weights=need)[0])
    model.train()
    drawn = torch.stack([model(x, x, x, need_weights=need)[0] for _ in range(400)])
    assert drawn.std(0).min() > 0
    # Dropout keeps the mean, and what follows the weights is linear in them.
    errors = (drawn.mean(0) - expected) / (drawn.std(0) / 400**0.5)
    assert errors.square().mean().sqrt() < 1.3


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_encoders_and_decoders_compute_what_they_did(norm_first):
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True, norm_first=norm_first).eval()
    own = ls.attention_to_linears_(copy.deepcopy(model))
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    arguments = {
        "tgt_mask": causal, "src_key_padding_mask": padding, "memory_key_padding_mask": padding,
        "tgt_is_causal": True,
    }  # fmt: skip
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Support for mismatched")
            expected = model(source, target, **arguments)
            torch.testing.assert_close(own(source, target, **arguments), expected)


@pytest.mark.parametrize("options", CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_states_of_before_and_of_after_are_loaded(options):
    model = nn.ModuleDict({"mix": attention(**options)})
    own = ls.attention_to_linears_(nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2, **options)}))
    own = own.double()
    state = model.state_dict()
    names = list(state)
    own.load_state_dict(state)
    assert list(state) == names
    given = inputs(model["mix"], True)
    torch.testing.assert_close(own["mix"](*given), model["mix"](*given))
    twin = ls.attention_to_linears_(copy.deepcopy(model))
    twin.load_state_dict(own.state_dict())
    assert torch.equal(twin["mix"](*given)[0], own["mix"](*given)[0])


def test_the_module_stays_the_same_object_and_what_is_frozen_stays_so():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    model[0].in_proj_weight.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    module = model.eval()[0]
    assert ls.attention_to_linears_(model) is model
    assert model[0] is module
    x = torch.randn(3, 8)
    module(x, x, x)
    assert calls == [1]
    projections = [module.q_proj, module.k_proj, module.v_proj]
    assert not any(p.weight.requires_grad or p.training for p in projections)
    assert all(p.bias.requires_grad for p in projections)
    assert sum(p.numel() for p in model.parameters()) == 4 * (64 + 8)


def test_there_must_be_attention_of_parameters():
    with pytest.raises(ValueError, match=r"no nn\.MultiheadAttention"):
        ls.attention_to_linears_(nn.Linear(2, 2))
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2)})
    prune.random_unstructured(model["mix"], "in_proj_weight", 0.5)
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"\['in_proj_weight'\] of mix is computed from others"):
        ls.attention_to_linears_(model)
    assert model.state_dict().keys() == before.keys()
    assert type(model["mix"]) is nn.MultiheadAttention


def two():
    return nn.ModuleDict({n: nn.MultiheadAttention(8, 2, kdim=8, vdim=5) for n in "ab"})


def tied(model, kind, other="a", to=None):
    setattr(model["b"], kind, getattr(model[other], to or kind))
    return model


def packed():
    return nn.ModuleDict({n: nn.MultiheadAttention(8, 2) for n in "ab"})


def of_another_layer():
    model = packed()
    model["c"] = nn.Linear(8, 24)
    return tied(model, "in_proj_weight", "c", "weight")


SHARED = {
    "packed": (lambda: tied(packed(), "in_proj_weight"), "'a.in_proj_weight', 'b.in_proj_weight'"),
    "bias": (lambda: tied(packed(), "in_proj_bias"), "'a.in_proj_bias', 'b.in_proj_bias'"),
    "queries": (lambda: tied(two(), "q_proj_weight"), "'a.q_proj_weight', 'b.q_proj_weight'"),
    "keys": (lambda: tied(two(), "k_proj_weight"), "'a.k_proj_weight', 'b.k_proj_weight'"),
    "values": (lambda: tied(two(), "v_proj_weight"), "'a.v_proj_weight', 'b.v_proj_weight'"),
    "in one module": (
        lambda: tied(two(), "k_proj_weight", "b", "q_proj_weight"),
        "'b.q_proj_weight', 'b.k_proj_weight'",
    ),
    "with another layer": (of_another_layer, "'b.in_proj_weight', 'c.weight'"),
}


@pytest.mark.parametrize("make, names", SHARED.values(), ids=SHARED)
def test_parameters_that_have_several_places_are_refused(make, names):
    model = make()
    before = list(model.named_parameters(remove_duplicate=False))
    with pytest.raises(
        ValueError, match=rf"\[{names}\] are one parameter.*give each place its own"
    ):
        ls.attention_to_linears_(model)
    after = list(model.named_parameters(remove_duplicate=False))
    assert all(n == m and p is q for (n, p), (m, q) in zip(before, after, strict=True))
    assert type(model["a"]) is type(model["b"]) is nn.MultiheadAttention


def test_one_module_in_several_places_and_a_shared_projection_of_outputs_stay_shared():
    one = nn.MultiheadAttention(8, 2)
    model = ls.attention_to_linears_(nn.ModuleList([one, one]))
    assert model[0] is model[1] is one and type(one) is ProjectedAttention
    model = tied(packed(), "out_proj")
    ls.attention_to_linears_(model)
    assert model["a"].out_proj is model["b"].out_proj
    assert model["a"].q_proj.weight is not model["b"].q_proj.weight


def test_a_projection_of_outputs_that_is_not_torchs_own_is_refused():
    for change in (nn.utils.parametrizations.weight_norm, lambda layer: nn.Sequential(layer)):
        mix = nn.MultiheadAttention(8, 2, batch_first=True)
        mix.out_proj = change(mix.out_proj)
        before = type(mix.out_proj)
        with pytest.raises(ValueError, match=f"out_proj of the model is a {before.__name__}"):
            ls.attention_to_linears_(mix)
        assert type(mix) is nn.MultiheadAttention and type(mix.out_proj) is before


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 16), body, nn.Flatten(), nn.Linear(16 * 8, 4))


def test_a_transformer_trains_and_ends_on_its_levels():
    model = ls.attention_to_linears_(encoder())
    torch.manual_seed(1)
    x = torch.randn(256, 8, 8)
    y = x.mean(1)[:, :4].argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.quantize_(model, ls.ternary(), skip=("first", "last"), example_input=x[:2])
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    scheduler = ls.QuantizationScheduler(
        model, ls.policies.StraightThrough(), epochs=6, steps_per_epoch=8, optimizer=optimizer
    )
    losses = []
    for _ in range(6):
        for chosen in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        scheduler.step({"train_loss": losses[-1]})
    assert losses[-1] < 0.7 * losses[0]
    ls.finalize_(model).eval()
    codes = ls.integer_weights(model)
    inside = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    names = [f"1.layers.{i}.{n}" for i in (0, 1) for n in (*inside, "linear1", "linear2")]
    assert list(codes) == names
    assert all(set(found.integers.unique().tolist()) <= {-1, 0, 1} for found in codes.values())
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1].layers[0].self_attn) is ProjectedAttention
        assert torch.equal(twin(x), expected)
    assert torch.equal(ls.remove_quantizers_(model)(x), expected)
    values = model[1].layers[0].self_attn.q_proj.weight
    assert all(len(row.abs().unique()) <= 2 for row in values)


def test_attention_is_compiled_without_breaks():
    model = ls.quantize_(ls.attention_to_linears_(encoder()), ls.ternary())
    x = torch.randn(2, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
