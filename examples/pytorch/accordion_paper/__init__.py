"""Parts of examples/pytorch/accordion_paper.py: experiments, data, models, training and reports."""
