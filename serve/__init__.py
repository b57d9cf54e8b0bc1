"""The HTTP edge: Ray Serve deployments of the registered champion, request schemas and settings.

Ray's own package of that name is ``ray.serve``; it is imported as ``ray_serve`` here. This package imports the library,
``geneformer_ray``, and never the jobs.

- ``settings``: what a service is started with; ``schemas``: what requests and answers look like
- ``found_model``: where a model lies; ``model``: a model opened for serving; ``errors`` and ``api``: limits and routes.
  None of these needs Ray.
- ``app``: the deployment, for ``serve run serve.app:app`` and ``serve deploy serve/config.yaml``
- ``run``: starts the service inside a running Ray and stops it again
"""

from __future__ import annotations

from geneformer_ray.settings import export_file

export_file()  # before anything here imports Ray or MLflow, which read the environment when they are imported
