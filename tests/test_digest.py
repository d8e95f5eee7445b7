"""The hash of tensors, against one written out by hand."""

import hashlib

import torch

from learnsched.digest import digest


class OnGpu(torch.Tensor):
    """Stands in for a tensor of a GPU: only a copy on the CPU gives NumPy its values."""

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_digest_is_that_of_names_types_shapes_and_bytes():
    tensor = torch.tensor([1.0, -2.0])
    by_hand = hashlib.sha256(b"a torch.float32 (2,)\n" + bytes.fromhex("0000803f000000c0"))
    assert digest({"a": tensor}) == by_hand.hexdigest()


def test_a_tensor_has_the_same_digest_with_a_graph_and_on_a_gpu():
    plain = torch.arange(6.0).view(2, 3)
    expected = digest({"a": plain})
    assert digest({"a": plain.clone().requires_grad_() * 1.0}) == expected
    assert digest({"a": plain.as_subclass(OnGpu)}) == expected
