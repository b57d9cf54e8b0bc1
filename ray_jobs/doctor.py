"""Check a set-up, and say what to do about each fault.

Looked at: versions, byte-code, disks, memory, CPUs, GPU, ports, API keys, authentication, the storage, the MLflow store
and its registry, a model, and each node of a running cluster. Nothing is left behind. The exit code is 0 without
faults, 1 with some; notes and warnings do not count.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import Field

from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import check_name
from geneformer_ray.progress import say
from geneformer_ray.settings import VARIABLES
from ray_jobs.command_line import JobConfig, in_submitted_copy, main, store_directory

if TYPE_CHECKING:
    from geneformer_ray.finding import Finding


class DoctorConfig(JobConfig):
    """Flags of ``python -m ray_jobs.doctor``; those left out stand in the settings."""

    ray_address: str | None = Field(None, description="a running cluster (default: none, jobs start their own)")
    jobs_address: str | None = Field(None, description="its dashboard: http://HOST:8265 (default: ask the cluster)")
    storage: str | None = Field(None, description="absolute path or URI that every node reaches")
    tracking_uri: str | None = Field(None, description="the MLflow store (default: mlflow/mlflow.db here)")
    registry_uri: str | None = Field(None, description="the model registry, where it is not the tracking store's")
    registered_model: str | None = Field(None, description="look for this name and its champion")
    api_keys_file: str | None = Field(None, description="the service's API keys")
    host: str = Field("127.0.0.1", description="what the service is to listen on")
    port: int = Field(8000, ge=1, le=65535, description="the service's port")
    model: str | None = Field(None, description="a model to open: a directory, a hub id or models:/NAME@ALIAS")
    vocabulary: str | None = Field(None, description="its vocabulary, where it carries none")
    local: bool = Field(False, description="without a running cluster, start a local one and look at its worker")


def run(config: DoctorConfig) -> dict[str, Any]:
    """Look at everything, tell each finding as it comes, and sum them up."""
    if config.storage is not None and not ("://" in config.storage or os.path.isabs(config.storage)):
        raise InputError("--storage", config.storage, "an absolute path or a URI: workers have folders of their own")
    if config.registered_model is not None:
        check_name(config.registered_model)
    given = dict(os.environ)
    for name in VARIABLES.keys() & DoctorConfig.model_fields.keys():
        if (value := getattr(config, name)) is not None:
            os.environ[VARIABLES[name]] = value  # Ray and MLflow read it there when they are imported, which is now
    from geneformer_ray.distribute.set_up import SetUp

    set_up = SetUp(
        environment=given,
        tracking_uri=config.tracking_uri or default_store(),
        **config.model_dump(exclude={"overwrite", "tracking_uri", "registry_uri"}),
    )
    findings: list[Finding] = []
    for one in set_up.findings():
        tell(one, findings[-1].group if findings else "")
        findings.append(one)
    faults, warnings = (sum(one.status == status for one in findings) for status in ("fault", "warning"))
    say(f"faults: {faults}, warnings: {warnings}")
    return {"faults": faults, "warnings": warnings, "checks": [asdict(one) for one in findings]}


def default_store() -> str | None:
    """Give the store that jobs make without a setting; None where it would be thrown away with a submitted copy."""
    return None if in_submitted_copy() else f"sqlite:///{store_directory()}/mlflow.db"


def tell(one: Finding, group: str) -> None:
    """Print a finding, below its group's name where that is new."""
    if one.group != group:
        say(one.group)
    say(f"  {one.status:8} {one.name.partition('.')[2]}: {one.found}")
    if one.do and one.status != "ok":
        say(f"{'':11}do: {one.do}")


if __name__ == "__main__":
    main(DoctorConfig, run, __doc__ or "", exit_code=lambda summary: 1 if summary["faults"] else 0)
