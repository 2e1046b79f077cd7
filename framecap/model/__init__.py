"""The engine: pictures in, sentences out, on one machine. Knows only PyTorch, tokenizers and Pillow."""
