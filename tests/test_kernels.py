"""The compiled kernels against the composed operations in double precision."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import learnsched as ls
from learnsched import kernels, native
from learnsched.levels import LevelSet, binary, power_of_two, signed, ternary, unsigned
from learnsched.noise import NOISES, noise_shape

UNEVEN = LevelSet((-2.0, -0.5, 0.0, 3.0), thresholds=(-1.0, -0.25, 1.0), name="uneven")
THIRDS = LevelSet((-1 / 3, 0.0, 1 / 3, 1.1), name="thirds")
SETS = [
    binary(), ternary(), unsigned(2), signed(3), unsigned(8), power_of_two(4), UNEVEN, THIRDS
]  # fmt: skip

every_set = pytest.mark.parametrize("levels", SETS, ids=lambda levels: levels.name)
every_noise = pytest.mark.parametrize("noise", NOISES)
compiled = pytest.mark.skipif(native.build().library is None, reason=native.build().reason)


@pytest.fixture
def composed(monkeypatch):
    """Calls a function with the compiled kernels put aside."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "build", lambda: native.Build(None, "put aside"))
            return function(*args)

    return call


def inputs(levels, shape=(4, 3, 700), seed=0):
    """x, grad, outer, and a std, a mean and a scale for each row; one row is hard."""
    generator = torch.Generator().manual_seed(seed)
    middle, width = (levels.values[0] + levels.values[-1]) / 2, levels.values[-1] - levels.values[0]
    x, grad, outer = torch.randn(3, *shape, generator=generator)
    std = torch.tensor([0.0, 0.07, 0.5, 1.9]).view(-1, *[1] * (len(shape) - 1)) * levels.step
    mean = 0.1 * torch.randn(std.shape, generator=generator)
    scale = torch.rand(std.shape, generator=generator) + 0.5
    return (middle + 0.7 * width * x) * scale, grad, outer, std, mean, scale


def double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def away_from_kinks(x, levels, std, mean, scale, noise):
    """Whether rounding cannot move an entry over an edge of the noise."""
    edges = torch.tensor(levels.thresholds, dtype=torch.float64)
    width = min(noise_shape(noise).half_width, 1e9)
    z = ((x.double() / scale.double() + mean.double())[..., None] - edges).abs()
    near = [(z - k * std.double()[..., None] * width).abs().amin(-1) < 1e-4 for k in (0, 1)]
    return ~(near[0] | near[1])


@compiled
@every_noise
@every_set
@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_equals_composed_in_double_precision(levels, noise, scaled, composed):
    x, grad, outer, std, mean, scale = inputs(levels)
    scale = scale if scaled else torch.ones_like(scale)
    smooth = away_from_kinks(x, levels, std, mean, scale, noise)
    x, grad, outer = (torch.where(smooth, t, t.new_tensor(0.0)) for t in (x, grad, outer))
    x = torch.where(smooth, x, -30.0)
    fixed = levels, std, mean, noise_shape(noise), scale if scaled else None
    per_entry = levels, std.expand_as(x), mean, noise_shape(noise), fixed[-1]
    per_std = torch.linspace(0.5, 2, 4).view(std.shape)
    for function, leading in (
        (kernels.value, ()),
        (kernels.slope, (grad,)),
        (kernels.std_slope, (grad,)),
        (kernels.slope_adjoint, (outer, grad)),
        (kernels.std_slope_adjoint, (per_std, grad)),
    ):
        ours = function(*leading, x, *fixed)
        truth = composed(function, *double(leading), x.double(), *double(fixed))
        each = composed(function, *double(leading), x.double(), *double(per_entry))
        for a, b, c in zip(*map(as_tuple, (ours, truth, each)), strict=True):
            assert a.shape == b.shape
            assert a.dtype == torch.float32
            # An error of x's last digit counts in units of the std; sums may cancel, their terms not.
            terms = c.abs().flatten(1)
            size = terms.sum(1) if a.shape == std.shape else terms.amax(1)
            worst = ((a.double() - b).abs().flatten(1).amax(1) / (size + 1e-3)).max()
            assert worst < 3e-6 * len(levels.values), function


@compiled
@every_set
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_the_compiled_staircase_is_hard_to_the_bit(levels, data):
    special = [*levels.thresholds, *levels.values, 0.49999997, math.inf, -math.inf, math.nan, -0.0]
    numbers = st.one_of(st.floats(-300, 300, width=32), st.sampled_from(special))
    x = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=40)))
    ours = kernels.value(x, levels, 0.0, 0.0, noise_shape("normal"), None)
    values = torch.tensor(levels.values)
    assert torch.equal(ours, values[levels.codes(x)])
    assert torch.equal(ours, levels.quantize(x))
    scale = torch.tensor(0.37)
    scaled = kernels.value(x, levels, 0.0, 0.0, noise_shape("normal"), scale)
    assert torch.equal(scaled, levels.quantize(x / scale) * scale)


@compiled
@every_noise
def test_not_a_number_is_not_hidden_by_noise(noise):
    x = torch.full((20,), math.nan)
    assert kernels.value(x, unsigned(2), 0.5, 0.0, noise_shape(noise), None).isnan().all()
    assert kernels.value(x, unsigned(2), 0.0, 0.0, noise_shape(noise), None).tolist() == [0.0] * 20


@compiled
@every_noise
@pytest.mark.parametrize("std", [1e-40, 1e-11, 1e-3, 1.0, 1e3])
def test_all_derivatives_are_finite_for_narrow_noise_and_far_inputs(noise, std):
    far = [3.4e38, 1e20, 1e4, 3.0, 0.5, 1e-20, 0.0]
    x = torch.tensor([*far, *(-v for v in far)]).repeat(3)
    one = torch.ones_like(x)
    fixed = x, ternary(), torch.tensor(std), 0.0, noise_shape(noise), None
    assert kernels.slope(one, *fixed).isfinite().all()
    for of in (
        *kernels.slope_adjoint(one, one, *fixed),
        *kernels.std_slope_adjoint(torch.ones(()), one, *fixed),
    ):
        assert of.isfinite().all()


@compiled
def test_results_do_not_depend_on_the_number_of_threads():
    x, grad, outer, std, mean, scale = inputs(unsigned(2), (4, 3, 30_000))
    fixed = x, unsigned(2), std, mean, noise_shape("normal"), scale
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((kernels.value(*fixed), *kernels.slope_adjoint(outer, grad, *fixed)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_strided_and_broadcast_inputs_equal_contiguous_ones():
    x = inputs(ternary(), (4, 6, 50))[0]
    fixed = ternary(), 0.4, 0.0, noise_shape("normal"), None
    turned = x.transpose(1, 2)
    assert torch.equal(kernels.value(turned, *fixed), kernels.value(x, *fixed).transpose(1, 2))
    one = torch.ones(()).expand_as(x)
    assert torch.equal(kernels.slope(one, x, *fixed), kernels.slope(torch.ones_like(x), x, *fixed))
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ours = kernels.slope(channels_last, channels_last, *fixed)
    truth = kernels.slope(channels_last.contiguous(), channels_last.contiguous(), *fixed)
    assert torch.equal(ours, truth)


@every_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(noise, dtype):
    x = torch.linspace(-4, 300, 301).to(dtype)
    for std in (0.0, 1e-3, 0.4):
        ours = kernels.value(x, unsigned(8), std, 0.0, noise_shape(noise), None)
        wide = kernels.value(x.float(), unsigned(8), std, 0.0, noise_shape(noise), None)
        assert ours.dtype == dtype
        assert torch.equal(ours, wide.to(dtype))
    grad = torch.ones_like(x)
    assert kernels.slope(grad, x, ternary(), 1e-3, 0.0, noise_shape(noise), None).isfinite().all()


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_gradients_are_the_same_through_torch_compile(noise):
    def run(x, std):
        y = ls.annealed_quantize(x, ternary(), forward_std=std, backward_std=0.6, noise=noise)
        return (y * y).sum()

    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaf, std = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        results.append(torch.autograd.grad(function(leaf, std), (leaf, std)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_quantized_model_exports_without_foreign_operators():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    model = ls.quantize_(model, ternary(), unsigned(2)).eval()
    x = torch.randn(5, 8)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("learnsched" in target for target in targets)


@compiled
@pytest.mark.parametrize("name", native.NAMES)
def test_the_operators_pass_torchs_own_checks(name):
    x, grad, outer, std, mean, scale = inputs(ternary(), (4, 5))
    leading = {
        "value": (), "slope": (grad,), "std_slope": (grad,), "slope_adjoint": (outer, grad),
        "std_slope_adjoint": (torch.ones_like(std), grad),
    }[name]  # fmt: skip
    operator = getattr(torch.ops.learnsched, name)
    fixed = x, std, mean, scale, ternary().values, ternary().thresholds, "normal"
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*leading, *fixed), test_utils=tests)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SHOW = "import learnsched; print(learnsched.show_config())"


def test_the_environment_chooses_and_a_wrong_choice_is_refused():
    assert (
        "kernels: eager (LEARNSCHED_KERNELS=eager)"
        in run_python(SHOW, LEARNSCHED_KERNELS="eager").stdout
    )
    result = run_python(SHOW, LEARNSCHED_KERNELS="fast")
    assert "choose one of auto, compiled, eager" in result.stderr


def test_without_a_compiler_everything_works_and_compiled_is_refused(tmp_path):
    nothing = {"PATH": str(tmp_path), "LEARNSCHED_CACHE": str(tmp_path), "CC": ""}
    code = "import torch, learnsched as ls; print(ls.annealed_quantize(torch.tensor([0.6]),"
    code += "ls.ternary(), forward_std=0.0, backward_std=1.0).item()); print(ls.show_config())"
    result = run_python(code, **nothing)
    assert result.stdout.startswith("1.0\n")
    assert "kernels: eager (not compiled: no C compiler" in result.stdout
    result = run_python(code, **nothing, LEARNSCHED_KERNELS="compiled")
    assert "LEARNSCHED_KERNELS=compiled, but the kernels cannot be compiled" in result.stderr


def test_without_a_home_or_a_word_of_the_compiler_everything_works(tmp_path):
    homeless = f"import pathlib\ndef home(): raise RuntimeError\npathlib.Path.home = home\n{SHOW}"
    environment = {"LEARNSCHED_CACHE": "", "XDG_CACHE_HOME": ""}
    assert "no home folder to keep kernels in" in run_python(homeless, **environment).stdout
    mute = tmp_path / "cc"
    mute.write_text("#!/bin/sh\nexit 1\n")
    mute.chmod(0o755)
    result = run_python(SHOW, CC=str(mute), LEARNSCHED_CACHE=str(tmp_path))
    assert "kernels: eager (not compiled: " in result.stdout


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path):
    (tmp_path / "learnsched").mkdir()
    (tmp_path / "learnsched").chmod(0o777)
    result = run_python(SHOW, LEARNSCHED_CACHE=str(tmp_path))
    assert "can be written by others" in result.stdout


# ---------------------------------------------------------------- many thresholds

smooth = pytest.mark.parametrize("noise", ["normal", "logistic"])
many = pytest.mark.parametrize(
    "levels", [unsigned(8), signed(4), power_of_two(4)], ids=lambda levels: levels.name
)


@compiled
@smooth
@many
@pytest.mark.parametrize("std", [0.2, 0.3, 0.6, 4.0])
def test_many_thresholds_are_summed_to_rounding_whatever_the_size(levels, noise, std, composed):
    std = torch.tensor(std * levels.step)
    generator = torch.Generator().manual_seed(0)
    width = levels.values[-1] - levels.values[0]
    x = levels.values[0] + width * (1.4 * torch.rand(6000, generator=generator) - 0.2)
    x = torch.cat([x, levels.values[0] + 2 * levels.step * torch.randn(6000, generator=generator)])
    one = torch.ones_like(x)
    fixed = levels, std, 0.0, noise_shape(noise), None
    value, slope = kernels.value(x, *fixed), kernels.slope(one, x, *fixed)
    wide = levels, std.double(), 0.0, noise_shape(noise), None
    truth = composed(kernels.value, x.double(), *wide)
    true_slope = composed(kernels.slope, one.double(), x.double(), *wide)
    largest = max(map(abs, levels.values))
    rounding = 1e-7 * largest + 2e-6 * (levels.step + float(std))
    assert (value - truth).abs().max() < rounding
    assert (slope - true_slope).abs().max() < 3e-6 * true_slope.max()
    # a few entries are summed threshold by threshold
    few = torch.cat([kernels.value(part, *fixed) for part in x.split(50)])
    torch.testing.assert_close(few, value, rtol=0, atol=2 * rounding)


@compiled
@smooth
def test_far_from_many_thresholds_the_end_levels_are_exact(noise):
    far = torch.tensor([-math.inf, -1e30, -1e4, -50.0, 400.0, 1e4, 1e30, math.inf, math.nan])
    x = torch.cat([far, torch.linspace(-3, 260, 20_000)])
    fixed = x, unsigned(8), torch.tensor(0.4), 0.0, noise_shape(noise), None
    value = kernels.value(*fixed)
    assert value[:8].tolist() == [0.0] * 4 + [255.0] * 4
    assert value[8].isnan()
    assert value[9:].isfinite().all()
    slope = kernels.slope(torch.ones_like(x), *fixed)
    assert slope[:8].abs().max() < 1e-20


# ---------------------------------------------------------------- transforms

LEADING = {"value": 0, "slope": 1, "std_slope": 1, "slope_adjoint": 2, "std_slope_adjoint": 2}
CASES = [(n, w) for n in native.NAMES for w in ("all", "x", "std", "leading", "scale")]
CASES.remove(("value", "leading"))


@compiled
@pytest.mark.parametrize(("name", "which"), CASES)
def test_operators_under_vmap_equal_one_by_one(name, which):
    x, grad, outer, std, mean, scale = inputs(ternary(), (4, 5, 6))
    outer = torch.ones(4) if name == "std_slope_adjoint" else outer
    leading = {0: (), 1: (grad,), 2: (outer, grad)}[LEADING[name]]
    full = (*leading, x, std.flatten(), mean.flatten(), scale.flatten())
    names = (*["leading"] * len(leading), "x", "std", "mean", "scale")
    dims = [0 if which in ("all", n) else None for n in names]
    args = [a if d == 0 else a[1] for a, d in zip(full, dims, strict=True)]
    operator = getattr(torch.ops.learnsched, name)

    def call(*tensors):
        return operator(*tensors, ternary().values, ternary().thresholds, "normal")

    ours = as_tuple(torch.func.vmap(call, in_dims=tuple(dims))(*args))
    members = [
        as_tuple(call(*(a[i] if d == 0 else a for a, d in zip(args, dims, strict=True))))
        for i in range(4)
    ]
    for result, parts in zip(ours, zip(*members, strict=True), strict=True):
        torch.testing.assert_close(result, torch.stack(parts))


def soft(x, std):
    return ls.annealed_quantize(x, unsigned(2), forward_std=std, backward_std=0.6)


def test_torch_compile_sees_through_vmap_over_noise_and_stays_right_around_a_gradient():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.0, 0.2, 0.5, 1.3])
    mapped = torch.func.vmap(soft)
    torch._dynamo.reset()
    traced = torch.compile(mapped, backend="aot_eager", fullgraph=True)(x, std)
    torch.testing.assert_close(traced, mapped(x, std))
    gradient = torch.func.grad(lambda x, std: soft(x, std).square().sum(), argnums=(0, 1))
    compiled_gradient = torch.compile(gradient, backend="aot_eager")
    for a, b in zip(compiled_gradient(x, std[1]), gradient(x, std[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jacobians_by_batched_gradients_are_diagonal(dtype):
    x = torch.randn(7, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = soft(x, 0.3)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (batched,) = torch.autograd.grad(y, x, torch.eye(7, dtype=dtype), is_grads_batched=True)
    torch.testing.assert_close(batched, slope.diag())
    jacobian = torch.func.jacrev(lambda x: soft(x, 0.3))(x.detach())
    torch.testing.assert_close(jacobian, slope.diag())


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_autocast_leaves_the_quantizer_in_single_precision(noise):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    options = {"forward_std": 0.3, "backward_std": 0.6, "noise": noise}
    with torch.autocast("cpu", torch.bfloat16):
        inside = ls.annealed_quantize(x, unsigned(2), **options)
    assert torch.equal(inside, ls.annealed_quantize(x, unsigned(2), **options))


# ---------------------------------------------------------------- nothing waits for a device


def network():
    layers = [
        torch.nn.Linear(8, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 3),
    ]
    model = ls.quantize_(torch.nn.Sequential(*layers), ternary(), unsigned(2), skip=())
    for name, buffer in model.named_buffers():
        if name.endswith("forward_std"):
            buffer.fill_(0.3)
    return model


def train_one_step(model, device):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(5, 8, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_training_step_reads_no_value_of_a_device():
    # tensors of this device have no values: reading one raises
    model = network().to("meta")
    train_one_step(model, "meta")
    assert all(p.grad is not None for p in model.parameters())


@compiled
@pytest.mark.filterwarnings("ignore:no batch norm")
def test_a_training_step_reads_no_value_of_a_tensor():
    class Counting(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = network()
    with Counting() as mode:
        train_one_step(model, "cpu")
        assert mode.reads == 0
        torch.ones(()).item()
    assert mode.reads == 1


@pytest.mark.parametrize("forward_std", [0.0, 0.3])
def test_nothing_but_x_and_the_noise_is_saved_for_backward(forward_std):
    x = torch.randn(1000, requires_grad=True)
    std, saved = torch.tensor(forward_std), []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ls.annealed_quantize(x, unsigned(2), forward_std=std, backward_std=std)
    assert {t.data_ptr() for t in saved if t.numel() > 1} == {x.data_ptr()}
