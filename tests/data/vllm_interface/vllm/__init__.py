"""A stand-in of vLLM: what it publishes for resolvers of adapters, and how it uses them, as of 0.33. No model is run."""
