"""Device, dtype and threads, and the reason for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from geneformer_ray.compute.execution import choose_execution, use_threads
from geneformer_ray.errors import InputError

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@pytest.fixture(autouse=True)
def threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "7")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 2), (3.9, 3), (0.5, 1), (0, 1)])
def test_a_process_uses_the_cpus_it_was_given(cpus: float, threads: int) -> None:
    assert use_threads(cpus) == threads
    assert torch.get_num_threads() == threads
    assert [os.environ[variable] for variable in VARIABLES] == [str(threads)] * len(VARIABLES)


@pytest.mark.parametrize("said", [None, "", "many"])
def test_by_default_all_cpus_that_the_process_may_run_on(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert use_threads() == torch.get_num_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("0", 1)])
def test_what_the_environment_says_is_kept(said: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert use_threads() == torch.get_num_threads() == threads
    assert use_threads(2) == 2


def test_execution_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="geneformer_ray.compute.execution")
    execution = choose_execution("fp32", cpus=1, gpu=False)
    assert (execution.device, execution.dtype, execution.attention, execution.threads) == (
        "cpu",
        torch.float32,
        "sdpa",
        1,
    )
    assert execution.reason == "cpu, float32 (fp32 was asked for), attention sdpa, 1 threads"
    assert caplog.messages == [f"execution: {execution.reason}"]
    assert torch.get_num_threads() == 1


def test_auto_follows_the_hardware() -> None:
    execution = choose_execution("auto", cpus=2, gpu=False)
    fast = execution.dtype == torch.bfloat16
    assert execution.dtype in (torch.float32, torch.bfloat16)
    assert f"(auto: {'fast' if fast else 'no fast'} bfloat16 on this CPU)" in execution.reason
    assert execution.reason.endswith("2 threads")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_computed_in_the_dtype(precision: str, dtype: torch.dtype) -> None:
    execution = choose_execution(precision, cpus=1, gpu=False)
    with execution.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp16", "", "FP32"])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    with pytest.raises(InputError, match=f"--precision: got {precision}; takes fp32, bf16 or auto"):
        choose_execution(precision, cpus=1)
    assert os.environ["OMP_NUM_THREADS"] == "7"
