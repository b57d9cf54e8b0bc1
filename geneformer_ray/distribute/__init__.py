"""Floor 4: Ray clusters, Ray Train workers, Ray Data pipelines: the only files here that import ray."""

from __future__ import annotations

import os
import secrets

from geneformer_ray.settings import export_file

export_file()
if os.environ.get("RAY_ADDRESS") in ("", "local"):
    del os.environ["RAY_ADDRESS"]  # two more ways to say that the cluster is one of our own
# Ray reads these when it is imported, so they are set before any module of this floor imports it. For a cluster of our
# own only: what RAY_ADDRESS names has its own. Token authentication with a token of our own, so that nothing has to be
# set up and nothing is left in the home directory; no usage report; a fast poll, for small trainings end in seconds.
# Workers have no RAY_ADDRESS either, but whoever started their cluster has decided for them: Ray gives them its raylet.
if not {"RAY_ADDRESS", "RAY_RAYLET_PID"} & os.environ.keys():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On loopback alone, through Ray's own switch for a cluster of one machine, off by default on two systems only:
    # otherwise every part of Ray listens on all interfaces. The same for Gloo, which the workers of a training talk by.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data's own actors make its core warn at every start
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
