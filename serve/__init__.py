"""The HTTP edge: Ray Serve deployments of the registered champion, request schemas and settings.

Ray's own package of that name is ``ray.serve``; it is imported as ``ray_serve`` here. This package imports the library,
``geneformer_ray``, and never the jobs.

- ``settings``: what a service is started with; ``schemas``: what requests and answers look like
- ``model``: a model opened for serving, usable without Ray; ``api``: the routes, without Ray too
- ``app``: the deployment, for ``serve run serve.app:app`` and ``serve deploy serve/config.yaml``
- ``run``: starts the service inside a running Ray and stops it again
"""
