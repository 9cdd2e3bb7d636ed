"""What the processes of a calibration send each other."""

from dataclasses import dataclass

import pytest
import torch

from parallel import run_processes
from quantkit.peers import apart, together


@dataclass(frozen=True)
class Pair:
    name: str
    tensor: torch.Tensor | None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_value_comes_out_of_its_letter_as_it_was(dtype):
    bits = torch.randint(0, 100, (3, 5), generator=torch.Generator().manual_seed(0))
    given = {"a": [Pair("b", bits.to(dtype)), Pair("c", None)], "d": (torch.tensor(2.5), torch.empty(0, 7))}
    letter, tensors = apart(given)
    found = together(letter.text, tensors)
    assert torch.equal(found["a"][0].tensor.float(), bits.to(dtype).float())
    assert found["a"][0].tensor.dtype == dtype
    assert found["a"][1] == Pair("c", None)
    assert [t.shape for t in found["d"]] == [torch.Size([]), torch.Size([0, 7])]


def test_tensors_are_not_pickled():
    letter, (tensor,) = apart([torch.nn.Parameter(torch.zeros(1 << 20))])
    assert len(letter.text) < 1000
    assert letter.tensors == [(torch.Size([1 << 20]), torch.float32, "cpu")]
    assert not tensor.requires_grad


def test_all_processes_get_what_each_has():
    assert run_processes("peers_ranks", ranks=3) == [0, 0, 0]
