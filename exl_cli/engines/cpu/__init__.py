"""The CPU engine: transformers' own model classes in float32."""
