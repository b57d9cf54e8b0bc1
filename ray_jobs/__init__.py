"""What ``ray job submit`` runs: one thin file a job."""
