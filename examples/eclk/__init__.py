"""Parts of eclk_logistic_regression.py: problems, their minima, methods with their settings, runs, pictures."""
