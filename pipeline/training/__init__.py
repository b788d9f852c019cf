"""Fine-tuning: windows, packing, the Trainer and its callbacks."""
