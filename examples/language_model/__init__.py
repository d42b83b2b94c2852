"""Comparison of ways to train one small GPT on several ranks: methods, text, runs, report. No framework is imported."""
