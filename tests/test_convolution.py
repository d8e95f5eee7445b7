"""Convolutions as matrix products against torch's own."""

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from learnsched.meta.convolution import ConvolutionsAsProducts

CASES = [
    (F.conv1d, (2, 3, 17), (5, 3, 5), {"stride": 2, "padding": 2}),
    (F.conv1d, (2, 3, 17), (5, 3, 3), {"padding": (1,)}),
    (F.conv2d, (2, 3, 9, 7), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    (F.conv2d, (2, 3, 8, 8), (4, 3, 1, 1), {}),
    (F.conv2d, (2, 4, 8, 8), (4, 2, 3, 3), {"groups": 2}),
    (F.conv2d, (2, 3, 8, 8), (4, 3, 3, 3), {"dilation": 2}),
    (F.conv2d, (2, 3, 8, 8), (4, 3, 3, 3), {"padding": "same"}),
]


@pytest.mark.parametrize(("function", "x", "weight", "options"), CASES)
def test_values_and_second_derivatives_are_those_of_the_convolution(function, x, weight, options):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True)
        for shape in (x, weight)
    )
    bias = torch.randn(len(weight), generator=generator, dtype=torch.double, requires_grad=True)

    def derivatives():
        y = function(x, weight, bias, **options)
        first = torch.autograd.grad((y**3).sum(), (x, weight, bias), create_graph=True)
        return y, *first, *torch.autograd.grad(sum((g**2).sum() for g in first), (x, weight))

    expected = derivatives()
    with ConvolutionsAsProducts():
        found = derivatives()
    torch.testing.assert_close(found, expected)


def test_a_stack_of_members_is_convolved_member_by_member():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 3, 8, 8, generator=generator)
    weight = torch.randn(5, 4, 3, 3, 3, generator=generator)
    with ConvolutionsAsProducts():
        found = vmap(lambda x, w: F.conv2d(x, w, stride=2, padding=1))(x, weight)
    expected = [F.conv2d(a, w, stride=2, padding=1) for a, w in zip(x, weight, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
