"""GGUF files for llama.cpp: written, checked, with the tokenizer."""
