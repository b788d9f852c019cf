"""What to change next: more data, more epochs, another learning rate. The commands, and the rules behind them."""
