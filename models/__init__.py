"""The laws: one hypothesis on the escape rate in each file, found by walking this folder."""
