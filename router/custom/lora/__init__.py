"""A LoRA adapter: for the embedded model on the processor, for a model behind vLLM on a GPU."""
