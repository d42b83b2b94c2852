"""Parts of eclk_logistic_regression.py: problems, minima, methods and their settings, runs, figures."""
