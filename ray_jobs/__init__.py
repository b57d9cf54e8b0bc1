"""What ``ray job submit`` runs: one thin file a job."""

from __future__ import annotations

import sys

from geneformer_ray.errors import InputError
from geneformer_ray.settings import export_file

# Before any job imports Ray or MLflow, which read the environment when they are imported.
try:
    export_file()
except InputError as error:
    print(f"python -m ray_jobs: {error}", file=sys.stderr)
    sys.exit(2)
