"""Advice on what to change next: the commands `advise` and `find-learning-rate`, and the rules behind them."""
