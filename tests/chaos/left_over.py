"""What is taken of a cluster: run with ``RAY_ADDRESS``, prints JSON.

``free SECONDS`` waits until nothing is, for so many seconds at most; ``where CLASS`` names the nodes of living actors.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import ray
from ray._private.state import actors
from ray.util import placement_group_table

# Ray's own, one a cluster and detached: they outlive the jobs that first needed them, and hold nothing.
ACTORS_OF_RAY = (
    "_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker", "_UsageCollectionActor", "TrainStateActor",
)  # fmt: skip


def living() -> list[dict[str, Any]]:
    return [actor for actor in actors().values() if actor["State"] != "DEAD"]


def taken() -> dict[str, Any]:
    """Resources that are not available, placement groups and actors that are not gone."""
    there, free = ray.cluster_resources(), ray.available_resources()
    groups = placement_group_table()
    return {
        "resources": {name: there[name] - free.get(name, 0) for name in there if there[name] != free.get(name, 0)},
        "placement_groups": [group["placement_group_id"] for group in groups.values() if group["state"] != "REMOVED"],
        "actors": [actor["ActorClassName"] for actor in living() if actor["ActorClassName"] not in ACTORS_OF_RAY],
    }


def main() -> None:
    what, argument = sys.argv[1:]
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    if what == "where":
        found = [actor["Address"]["NodeID"] for actor in living() if actor["ActorClassName"] == argument]
        print(json.dumps({"nodes": found, "alive": [node["NodeID"] for node in ray.nodes() if node["Alive"]]}))
        return
    started = time.monotonic()
    while any((left := taken()).values()) and time.monotonic() - started < float(argument):
        time.sleep(0.2)
    print(json.dumps({"seconds": time.monotonic() - started, **left}))


if __name__ == "__main__":
    main()
