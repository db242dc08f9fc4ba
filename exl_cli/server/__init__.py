"""HTTP: the surfaces of OpenAI, Anthropic and TabbyAPI over engines with continuous batching."""
