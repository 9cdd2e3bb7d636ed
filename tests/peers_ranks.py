"""What each process of test_peers.py does."""

from collections.abc import Callable

import torch

from quantkit import QuantKitError
from quantkit.peers import join

DTYPES = (torch.uint8, torch.int32, torch.bfloat16, torch.float8_e4m3fn, torch.float32)


def had_by(rank: int) -> dict[str, torch.Tensor]:
    """What a process has: other tensors, of other shapes, than the others."""
    generator = torch.Generator().manual_seed(rank)
    found = {str(dtype): torch.randint(0, 9, (rank, 7), generator=generator).to(dtype) for dtype in DTYPES}
    return found | {"alone": torch.tensor(rank / 3)} if rank else found


def main(rank: int) -> None:
    """Exits with an error unless all is as it should be."""
    peers = join(torch.device("cpu"))
    for found in (peers.gather(had_by(rank), "test"), peers.exchange(lambda: had_by(rank), "test")):
        assert len(found) == peers.count
        for theirs, tensors in enumerate(found):
            assert_same(tensors, had_by(theirs))
            storages = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
            assert len(storages) == sum(t.numel() > 0 for t in tensors.values())  # files hold no memory twice
    assert_same(peers.from_first(lambda: had_by(2), "test"), had_by(2))

    def fail(at: int) -> None:
        if rank == at:
            raise QuantKitError(f"of process {at}")

    assert said(lambda: peers.exchange(lambda: fail(1), "test")) == "of process 1"
    assert said(lambda: peers.from_first(lambda: fail(0), "test")) == "of process 0"
    assert said(lambda: peers.from_first(lambda: fail(1), "test")) == ""  # the first one alone makes it


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except QuantKitError as error:
        return str(error)
    return ""


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
