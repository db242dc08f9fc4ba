"""The engines that turn token ids into token ids. Each is imported only when a model is loaded with it."""
