"""Plain-PyTorch specifications. Every backend is tested against these; they run on any device."""
