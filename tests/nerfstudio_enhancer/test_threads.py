import threading

import pytest
import torch

from nerfstudio_enhancer.threads import map_on_threads


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_that_have_one_each(threads: int) -> None:
    seen = map_on_threads(lambda item: (item, torch.get_num_threads()), range(20))
    assert seen == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == threads


def test_threads_work_at_the_same_time() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    both = threading.Barrier(2)
    try:
        assert sorted(map_on_threads(lambda item: both.wait(timeout=30), range(2))) == [0, 1]
    finally:
        torch.set_num_threads(before)


def test_gradients_are_off_where_the_caller_has_them_off(threads: int) -> None:
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert not any(map_on_threads(lambda item: (weight * item).requires_grad, range(4)))
    assert all(map_on_threads(lambda item: (weight * item).requires_grad, range(4)))


def test_an_error_reaches_the_caller_and_the_threads_are_given_back(threads: int) -> None:
    def fail(item: int) -> None:
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        map_on_threads(fail, range(6))
    assert torch.get_num_threads() == threads
