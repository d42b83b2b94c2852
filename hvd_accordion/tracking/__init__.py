"""What a training leaves in MLflow: metrics, figures, and a watchdog that ends the runs of killed jobs."""
