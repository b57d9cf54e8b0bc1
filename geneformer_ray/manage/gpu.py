"""The GPU: what the driver shows, what torch can use of it, and why they differ."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from typing import TYPE_CHECKING

from geneformer_ray.finding import Finding, fault, note, ok

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_gpu"]

ANSWER_SECONDS = 20.0


def check_gpu() -> Iterator[Finding]:
    """Compare the GPUs that the driver shows with those that torch computes on. None at all is a fact, no fault."""
    shown, why_none = _of_driver()
    if why_none:
        yield fault("gpu.driver", why_none, "nvidia-smi must list the GPUs: install or restart NVIDIA's driver")
        return
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable:
        yield from _computing(usable, shown)
    elif not shown:
        yield note("gpu.torch", "none: jobs and the service compute on the CPU")
    elif torch.version.cuda is None:
        version = torch.__version__.partition("+")[0]
        do = f"install a CUDA build: pip install --force-reinstall torch=={version} --index-url INDEX_OF_CUDA_BUILDS"
        yield fault("gpu.torch", f"{shown[0]}, but torch {torch.__version__} was built without CUDA", do)
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        yield note("gpu.torch", f"{shown[0]}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    else:
        # torch says it itself when the driver is too old for its build.
        why = " ".join(str(said[0].message).split())[:300] if said else "torch does not say why"
        do = f"update the driver, or install a build of torch for an older CUDA than {torch.version.cuda}"
        yield fault("gpu.torch", f"{shown[0]}, and torch cannot use it: {why}", do)


def _of_driver() -> tuple[list[str], str]:
    """Give a line for each GPU that the driver shows, or why it shows none though it is installed."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], ""
    try:
        done = subprocess.run(
            [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi does not answer within {ANSWER_SECONDS:g} s"
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode != 0:
        return [], f"nvidia-smi ended with {done.returncode}: {lines[-1] if lines else 'nothing said'}"
    return [line.replace(", ", ", driver ", 1) for line in lines], ""


def _computing(usable: int, shown: list[str]) -> Iterator[Finding]:
    import torch

    for number in range(usable):
        device = torch.device("cuda", number)
        name = torch.cuda.get_device_name(device)
        try:
            total = float((torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum())
        except RuntimeError as error:  # kernels for another generation, or memory that others have taken
            why = str(error).splitlines()[0]
            yield fault("gpu.torch", f"{name} does not compute: {why}", "nvidia-smi; a build of torch for this GPU")
            continue
        if total != 64**3:
            yield fault("gpu.torch", f"{name} computes wrongly: {total}, not {64**3}", "nvidia-smi -q shows its errors")
            continue
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        free, whole = (amount / 1024**3 for amount in torch.cuda.mem_get_info(device))
        found = f"{name}, {free:.0f} of {whole:.0f} GiB free, CUDA {torch.version.cuda}"
        yield ok("gpu.torch", f"{found}, {'bf16' if bf16 else 'no bf16: use --precision fp32'}")
    if usable < len(shown):
        yield note("gpu.hidden", f"{len(shown)} GPUs are there, {usable} are seen", "see CUDA_VISIBLE_DEVICES")
