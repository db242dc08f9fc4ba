"""The CPU engine: transformers' model classes in float32."""
