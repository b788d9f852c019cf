"""Where the model to be fine-tuned comes from: the Hugging Face hub, or from scratch."""
