"""Floor 3: MLflow tracking and registry, reports, plots."""
