"""The server: an OpenAI-style interface and a page, for many people on one model (docs/serve.md)."""
