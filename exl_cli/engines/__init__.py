"""The engines. Each is imported only when a model is loaded with it."""
