"""Records of a training in MLflow: metrics, figures, and a watchdog that ends the runs of killed jobs."""
