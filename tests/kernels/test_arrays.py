"""What may be passed to a kernel: every door that is open, and a clear answer at every one that is not."""

from __future__ import annotations

import array
import gc
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerlens.kernels import gradient_energy, row_moments, row_sum_of_squares


def test_buffers_tensors_and_arrays_give_the_same(isa: str) -> None:
    values = [3.0, -4.0, 12.0]
    for x in (
        np.array(values),
        array.array("f", values),
        memoryview(array.array("d", values)),
        torch.tensor(values, dtype=torch.bfloat16),
        torch.tensor(values, requires_grad=True),
        torch.nn.Parameter(torch.tensor(values)),
        torch.tensor(values, dtype=torch.float64)[None, :, None],
        np.float32(13.0),
    ):
        assert gradient_energy(x) == 169.0


def test_ml_dtypes_bfloat16_arrays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16)
    assert gradient_energy(x[:, ::2]) == float((np.arange(12).reshape(3, 4)[:, ::2] ** 2).sum())


def test_tensors_are_read_in_place_and_released() -> None:
    x = torch.ones(4, 5)
    x[2, 3] = 7.0
    assert row_moments(x).max_abs.tolist() == [1.0, 1.0, 7.0, 1.0]
    gone = weakref.ref(x)
    storage = x.untyped_storage()
    gradient_energy(x)
    del x
    gc.collect()
    assert gone() is None
    assert storage.nbytes() == 80


def test_negative_strides_and_read_only_arrays_are_fine(isa: str) -> None:
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    x.flags.writeable = False
    np.testing.assert_array_equal(row_moments(x[::-1, ::-1]).sum, [38.0, 22.0, 6.0])
    assert gradient_energy(np.broadcast_to(np.float32(2.0), (3, 5))) == 60.0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 2), dtype=np.int64), "x has elements of int64; the kernels read float32, float64, bfloat16 and"),
        (np.ones((2, 2), dtype=np.complex64), "x has elements of complex64"),
        (np.ones((2, 2), dtype=np.longdouble), "x has elements of "),
        (np.ones((2, 2), dtype=">f4"), "x has elements of >f4.*native byte order"),
        (np.array([["a"]]), "x has elements of <U1"),
        (np.array([[None]]), "x has elements of object"),
        (torch.ones(2, 2, dtype=torch.int32), "x has elements of torch.int32"),
        (
            torch.ones(2, 2, dtype=torch.float8_e4m3fn),
            "x has elements of torch.float8|x .Tensor. cannot be read in place",
        ),
        (torch.ones(2, 2).to_sparse(), "x .Tensor. cannot be read in place through DLPack"),
        (torch.ones(2, 2, device="meta"), "x .Tensor. cannot be read in place through DLPack"),
        (b"abcd", "x has elements of buffer format 'B'"),
        ([[1.0, 2.0]], "x must be a NumPy array, a CPU tensor .DLPack. or a buffer of float32.*got list"),
        (None, "x must be a NumPy array.*got NoneType"),
        (3.0, "x must be a NumPy array.*got float"),
        (np.ma.masked_array([[1.0]], mask=[[True]]), "x is a masked array"),
    ],
)
def test_what_cannot_be_read_is_a_type_error(x: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        row_moments(x)


def test_the_lazy_negation_of_torch_is_seen() -> None:
    negated = torch.imag(torch.tensor([[1 + 2j, 3 + 4j]], dtype=torch.complex64).conj())
    assert negated.is_neg()
    assert row_moments(negated).sum.tolist() == [-6.0]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_are_refused() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.ones(3, 4)
    for x in (freed, fake):
        with pytest.raises(TypeError, match=r"x .*Tensor. has no memory behind it"):
            gradient_energy(x)
    with pytest.raises(TypeError, match=r"x .Tensor. cannot be read in place through DLPack"):
        torch.func.vmap(lambda row: torch.tensor(gradient_energy(row)))(torch.ones(3, 4))


def test_tensors_on_a_gpu_are_refused_before_their_memory_is_touched() -> None:
    class OnGpu:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 1)

        def __dlpack__(self) -> object:
            raise AssertionError("must not be asked for memory")

    with pytest.raises(TypeError, match=r"x is on CUDA device 1; the kernels read CPU memory: pass x.cpu\(\)"):
        gradient_energy(OnGpu())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_row_kernels_want_two_axes(shape: tuple[int, ...]) -> None:
    for function in (row_moments, row_sum_of_squares):
        with pytest.raises(ValueError, match=r"x must have the two axes \[rows, cols\], got " + str(len(shape))):
            function(np.ones(shape))
